// Draws the charts of the page. vegaEmbed comes with the libraries that this script is bundled with.
function draw(figure) {
  const content = JSON.parse(document.getElementById(figure.dataset.chart).textContent);
  const options = [...figure.querySelectorAll("select")].map((select) => select.value);
  const view = { ...content.views[options.join(" / ")], data: { values: content.rows } };
  // ast: expressions are interpreted, because the page allows no code that is made at run time
  const settings = { actions: false, renderer: "svg", ast: true, tooltip: { theme: "custom" } };
  return vegaEmbed(figure.querySelector(".chart"), view, settings);
}
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  for (const select of figure.querySelectorAll("select")) select.addEventListener("change", () => draw(figure));
  draw(figure);
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
