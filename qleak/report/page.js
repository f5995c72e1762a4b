"use strict";
// All content is there without this script. It enlarges pictures, moves among them by arrow keys, saves figures, copies.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  for (const button of all("button[data-save], button[data-copy]")) button.hidden = false;

  const save = (name, url) => {
    const link = document.createElement("a");
    link.download = name;
    link.href = url;
    link.click();
  };
  const drawing = (figure) => {
    const svg = figure.querySelector("svg").cloneNode(true);
    svg.setAttribute("style", "color: #0a0b0c; background: #ffffff; font-family: sans-serif");
    return "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(svg));
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.save) {
      const figure = button.closest("figure"), url = drawing(figure);
      if (button.dataset.save === "svg") return save(button.dataset.name + ".svg", url);
      const image = new Image();
      image.onload = () => {
        const box = figure.querySelector("svg").viewBox.baseVal, canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [box.width * 3, box.height * 3];
        canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
        const made = canvas.toDataURL("image/png");
        figure.dataset.png = made.length;
        save(button.dataset.name + ".png", made);
      };
      image.src = url;
    } else if (button.dataset.copy) {
      const text = document.getElementById(button.dataset.copy);
      getSelection().selectAllChildren(text);
      const done = () => { button.textContent = "copied"; };
      if (navigator.clipboard) navigator.clipboard.writeText(text.textContent).then(done, () => {});
    } else if (button.classList.contains("pic")) enlarge(button);
    else if (button.dataset.close) button.closest("dialog").close();
  });

  const enlarge = (button) => {
    const dialog = document.getElementById("large"), pair = dialog.querySelector(".pair");
    const group = button.closest("tr, .pictures"), original = group && group.querySelector("[data-original] img");
    pair.replaceChildren();
    for (const [image, title] of [[original, "original"], [button.querySelector("img"), "guess"]]) {
      if (!image) continue;
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      caption.textContent = title;
      figure.append(image.cloneNode(), caption);
      pair.append(figure);
    }
    dialog.querySelector(".details").textContent = button.querySelector("img").alt + ". " + button.querySelector(".tip").textContent;
    dialog.showModal();
  };

  // One stop for the tab key in each sheet of pictures; arrows move inside it.
  for (const sheet of all(".pictures")) {
    const buttons = all(".pic", sheet);
    buttons.forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
    sheet.addEventListener("keydown", (event) => {
      const at = buttons.indexOf(document.activeElement);
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: Number(sheet.dataset.columns), ArrowUp: -Number(sheet.dataset.columns) }[event.key];
      if (at < 0 || !step || !buttons[at + step]) return;
      event.preventDefault();
      buttons[at].tabIndex = -1;
      buttons[at + step].tabIndex = 0;
      buttons[at + step].focus();
    });
  }
  let closed = [];
  addEventListener("beforeprint", () => { closed = all("details:not([open])"); closed.forEach((d) => { d.open = true; }); });
  addEventListener("afterprint", () => closed.forEach((d) => { d.open = false; }));
})();
