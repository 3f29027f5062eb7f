# Sourced by examples/quickstart.sh: its options, the environment, and the functions that add and run steps.
#
#   step NAME OUTPUT... -- COMMAND [--then COMMAND]   adds a step: its name, what it makes, and how
#   run_steps                                         runs the steps that have no result yet, then writes the report

plan=()
step() { plan+=("$@" ""); }

read_options() {  # sets profile and run, makes or reuses the environment, and enters the checkout
    started_as="bash examples/quickstart.sh${*:+ $*}" profile=quickstart run="" results=()
    while (($#)); do
        case "$1" in
            --smoke) profile=smoke results=() ;;
            --learn) profile=learn results=(--results docs/results) ;;
            --output)
                shift
                if [[ -z "${1:-}" ]]; then echo "error: --output needs a folder" >&2; exit 2; fi
                run="$1"
                ;;
            -h | --help) sed -n '2,/^$/{s/^# \{0,1\}//p}' "$root/examples/quickstart.sh"; exit 0 ;;
            *)
                echo "error: $1 is not a known option; known are --smoke, --learn, --output DIR and --help" >&2
                exit 2
                ;;
        esac
        shift
    done
    run="$(realpath -m -- "${run:-$root/runs/$profile}")"
    run="${run#"$root/"}"  # commands are shown as one would type them in the checkout
    source "$root/examples/setup_venv.sh"
    ensure_venv "$root" data,evaluation,logging
    setup_seconds=$SECONDS
    export CUDA_VISIBLE_DEVICES=  # two and four ranks are started, which one GPU does not take
    cd "$root"
}

run_steps() {
    exec python -m megatron_vl.cli.quickstart "$run" --profile "$profile" --started-as "$started_as" \
        --setup-seconds "$setup_seconds" "${results[@]}" < <(printf '%s\0' "${plan[@]}")
}
