// Two rows of filter buttons over the gallery: one task, one outcome; a sample shows when it fits both.
const chosen = { task: "", outcome: "" };
for (const button of document.querySelectorAll(".filters button")) {
  button.addEventListener("click", () => {
    const { field, value } = button.dataset;
    chosen[field] = value;
    for (const peer of document.querySelectorAll(`.filters button[data-field="${field}"]`)) {
      peer.setAttribute("aria-pressed", String(peer === button));
    }
    let shown = 0;
    for (const sample of document.querySelectorAll("#gallery .sample")) {
      const fits = (!chosen.task || sample.dataset.task === chosen.task) && (!chosen.outcome || sample.dataset.outcome === chosen.outcome);
      sample.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    document.getElementById("nothing").hidden = shown > 0;
  });
}
