#!/usr/bin/env bash
# A tiny Qwen-VL from raw data to a scored model and a report, on two cores and without GPU:
#
#   bash examples/quickstart.sh [--smoke | --learn] [--output DIR]
#
# About 15 minutes. --smoke takes 3: everything runs, nothing is learned. --learn takes more than an hour: it learns to
# see. Started again, it skips steps that are done and goes on where it stopped. A step runs again if its command, its
# recipe or a step that it needs has changed; code that has changed repeats nothing. The result is report.html in the
# run directory: runs/quickstart, runs/smoke or runs/learn. --learn also writes docs/results/learn.json and learn.md.

# Each step below is a command that you can type yourself. The last line runs them all, in this order. A training has
# the machine to itself; other steps run two at a time where one does not need the other.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
source "$root/examples/run_steps.sh"
read_options "$@"

#              scenes                       steps of the stages               those at a  questions
#              to train on   held out       0      1      2       3           2nd layout  of each task
case "$profile" in
    smoke)      scenes=1500   heldout=300    s0=30  s1=40  s2=40   s3=40       second=10   questions=16 ;;
    quickstart) scenes=20000  heldout=1000   s0=400 s1=300 s2=700  s3=80       second=30   questions=150 ;;
    learn)      scenes=60000  heldout=3000   s0=800 s1=600 s2=8000 s3=150      second=50   questions=400 ;;
esac
recipes=examples/tiny
two=(torchrun --standalone --nproc-per-node 2 tools/train.py)
four=(torchrun --standalone --nproc-per-node 4 tools/train.py)

# Data. Scenes and pages are drawn, and written in the formats of published data sets.
draw=(python tools/make_synthetic_data.py --num-workers 2 --no-progress)
step "raw data" "$run/raw/train" "$run/raw/heldout" -- \
    "${draw[@]}" "$run/raw/train" --split train --seed 1 --num-scenes "$scenes" \
    --then "${draw[@]}" "$run/raw/heldout" --split heldout --seed 2 --num-scenes "$heldout"

# They are tokenized and packed into rows of 512 tokens: four training sets, and a held-out set for each task.
prepare() {  # prepare NAME SPLIT
    step "data, $1" "$run/data/$1.json" -- python tools/prepare_data.py "$recipes/data/$1.yaml" --model-preset tiny \
        --root "$run/raw/$2" --output "$run/data/$1" --quiet
}
for name in stage0_text stage1_pretrain stage2_multitask stage3_sft; do prepare "$name" train; done
for task in caption vqa referring ocr chat; do prepare "heldout_$task" heldout; done
ask=(python tools/make_questions.py --model-preset tiny --root "$run/raw/heldout" --limit "$questions")
step "questions" "$run/eval/questions.jsonl" -- \
    "${ask[@]}" "$recipes/data/heldout.yaml" --output "$run/eval/questions.jsonl"
step "dialogues" "$run/eval/dialogues.jsonl" -- \
    "${ask[@]}" "$recipes/data/heldout_chat.yaml" --output "$run/eval/dialogues.jsonl"

# A page for each training set shows rows as the model sees them.
for name in stage0_text stage1_pretrain stage2_multitask stage3_sft; do
    step "page, $name" "$run/data/$name.html" -- python tools/inspect_data.py "$run/data/$name" --rows 30 --seed 0
done

# Stage 0 trains the language model on text alone. It stands for Qwen-7B, with which the paper begins.
step "stage 0" "$run/model/stage0" -- \
    "${two[@]}" "$recipes/stage0_text.yaml" --data-path "$run/data/stage0_text" --save "$run/model/stage0" \
    --auto-resume --train-iters "$s0"

# Stage 1, pre-training: vision tower and resampler learn from captions, and the language model is frozen. The stages of
# the paper begin with two data-parallel ranks. Their last steps go on from the checkpoint at another layout.
stage1=("$recipes/stage1_pretrain.yaml" --data-path "$run/data/stage1_pretrain" --auto-resume
    --pretrained-checkpoint "$run/model/stage0")
step "stage 1" "$run/model/stage1" -- \
    "${two[@]}" "${stage1[@]}" --save "$run/model/stage1" --train-iters $((s1 - second)) --lr-decay-iters "$s1" \
    --then "${four[@]}" "${stage1[@]}" --save "$run/model/stage1" --train-iters "$s1" \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

# Stage 2, multi-task pre-training: everything learns from captions, boxes, questions, pages and text.
stage2=("$recipes/stage2_multitask.yaml" --data-path "$run/data/stage2_multitask" --auto-resume)
step "stage 2" "$run/model/stage2" -- \
    "${two[@]}" "${stage2[@]}" --pretrained-checkpoint "$run/model/stage1" --save "$run/model/stage2" \
    --train-iters $((s2 - second)) --lr-decay-iters "$s2" \
    --then "${four[@]}" "${stage2[@]}" --pretrained-checkpoint "$run/model/stage1" --save "$run/model/stage2" \
    --train-iters "$s2" --pipeline-model-parallel-size 2

# Stage 3, supervised fine-tuning: language model and resampler learn from dialogues, and the vision tower is frozen.
stage3=("$recipes/stage3_sft.yaml" --data-path "$run/data/stage3_sft" --auto-resume
    --pretrained-checkpoint "$run/model/stage2" --save "$run/model/stage3")
step "stage 3" "$run/model/stage3" -- \
    "${two[@]}" "${stage3[@]}" --train-iters $((s3 - second)) --lr-decay-iters "$s3" \
    --then "${two[@]}" "${stage3[@]}" --train-iters "$s3" \
    --pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2

# The control experiment: the same stages, with every picture blanked. What this model knows does not come from images.
step "blind stage 1" "$run/blind/stage1" -- \
    "${two[@]}" "${stage1[@]}" --save "$run/blind/stage1" --train-iters "$s1" --blank-images
step "blind stage 2" "$run/blind/stage2" -- \
    "${two[@]}" "${stage2[@]}" --pretrained-checkpoint "$run/blind/stage1" --save "$run/blind/stage2" \
    --train-iters "$s2" --blank-images

# Answers of both models to held-out questions, and replies of the last stage in held-out dialogues.
answer=(python tools/generate.py --inputs "$run/eval/questions.jsonl" --max-new-tokens 96)  # a page has up to 90
step "answers" "$run/eval/predictions_model.jsonl" -- \
    "${answer[@]}" --checkpoint "$run/model/stage2" --output "$run/eval/predictions_model.jsonl"
step "blind answers" "$run/eval/predictions_blind.jsonl" -- \
    "${answer[@]}" --checkpoint "$run/blind/stage2" --output "$run/eval/predictions_blind.jsonl" --blank-images
step "replies" "$run/eval/replies.jsonl" -- python tools/generate.py --inputs "$run/eval/dialogues.jsonl" \
    --checkpoint "$run/model/stage3" --chat-format chatml --output "$run/eval/replies.jsonl"

# Held-out losses of both models.
losses() {  # losses MODEL STAGE SET... [FLAG]
    step "losses, $1 $2" "$run/eval/losses/$1_$2.json" -- python tools/evaluate_loss.py --checkpoint "$run/$1/$2" \
        --output "$run/eval/losses/$1_$2.json" --data-path "${@:3}"
}
caption="$run/data/heldout_caption" chat="$run/data/heldout_chat"
tasks=("$caption" "$run/data/heldout_vqa" "$run/data/heldout_referring" "$run/data/heldout_ocr")
losses model stage1 "$caption"
losses model stage2 "${tasks[@]}" "$chat"
losses model stage3 "$chat"
losses blind stage1 "$caption" --blank-images
losses blind stage2 "${tasks[@]}" --blank-images

# Hugging Face folders: the result, and two whose language models must be equal, because stage 1 froze it.
export_stage() {  # export_stage STAGE [FLAGS]
    step "export, $1" "$run/hf/$1" -- \
        python tools/convert_checkpoint.py export "$run/model/$1" "$run/hf/$1" "${@:2}"
}
export_stage stage0; export_stage stage1
export_stage stage3 --release chat --vocab-file

run_steps
