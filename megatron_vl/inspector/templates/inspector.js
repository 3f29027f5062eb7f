"use strict";
// Shows the segments that fit the filter, which lives in the address: #source=captions&task=caption&text=a red ball.
(() => {
  const form = document.getElementById("filter");
  const found = document.getElementById("found");
  const fields = ["source", "task", "text"];
  const rows = Array.from(document.querySelectorAll(".row"), (row) => ({
    row,
    segments: Array.from(row.querySelectorAll(".segment"), (segment) => ({ segment, data: segment.dataset })),
  }));

  // What is searched: the text with its markup, the text without it, and the key.
  function words(entry) {
    if (entry.words === undefined) {
      const runs = Array.from(entry.segment.querySelectorAll(".run:not(.coordinates)"), (run) => run.textContent);
      const marked = entry.segment.querySelector(".text").textContent;
      entry.words = [entry.data.key, runs.join(""), marked].join("\n").toLowerCase();
    }
    return entry.words;
  }

  function wanted() {
    const hash = new URLSearchParams(location.hash.slice(1));
    return Object.fromEntries(fields.map((name) => [name, hash.get(name) || ""]));
  }

  function unknown(wish) {
    const lists = ["source", "task"].filter((name) => wish[name]);
    return lists.filter((name) => !Array.from(form.elements[name].options).some((option) => option.value === wish[name]));
  }

  function apply() {
    const wish = wanted();
    const text = wish.text.toLowerCase();
    const all = !wish.source && !wish.task && !wish.text;
    let numRows = 0;
    let numSegments = 0;
    for (const { row, segments } of rows) {
      let shown = 0;
      for (const entry of segments) {
        const { source, task } = entry.data;
        const fits = (!wish.source || wish.source === source) && (!wish.task || wish.task === task);
        entry.segment.hidden = !(fits && (!text || words(entry).includes(text)));
        shown += !entry.segment.hidden;
      }
      row.hidden = !all && shown === 0;
      numRows += !row.hidden;
      numSegments += shown;
    }
    for (const name of fields) if (form.elements[name].value !== wish[name]) form.elements[name].value = wish[name];
    const missing = unknown(wish).map((name) => `These rows have no ${name} “${wish[name]}”. `).join("");
    found.textContent = `${missing}${numRows} of ${rows.length} rows, ${numSegments} segments`;
  }

  function change() {
    const pairs = fields.map((name) => [name, form.elements[name].value]).filter(([, value]) => value);
    history.replaceState(null, "", `#${new URLSearchParams(pairs)}`);
    apply();
  }

  // A badge of the text and a shape on a picture of the same segment light each other up.
  function light(event) {
    const place = event.target.closest("[data-shape]");
    for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
    if (!place) return;
    const both = place.closest(".segment").querySelectorAll(`[data-shape="${place.dataset.shape}"]`);
    for (const part of both) part.classList.add("lit");
  }

  function enlarge(event) {
    const picture = event.target.closest("button.picture");
    if (picture) picture.classList.toggle("large");
  }

  form.addEventListener("input", change);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(change));
  document.addEventListener("mouseover", light);
  document.addEventListener("focusin", light);
  document.addEventListener("click", enlarge);
  addEventListener("hashchange", apply);
  apply();
})();
