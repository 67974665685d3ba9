// What anywidget asks for: `initialize` once per widget model, `render` once per view of it.

const view = (store, root) =>
  typeof createPanel === "function" ? createPanel(store, root) : plotAlone(store, root);

function plotAlone(store, root) {
  const failure = h("div", { class: "ik-link", role: "alert", hidden: true });
  const plot = createPlot(store, root);
  const section = h("section", { class: "ik-section", "aria-label": "Latency" }, plot.element);
  root.append(failure, section);
  const unlisten = store.listen(() => {
    const { failure: told } = store.parts;
    failure.hidden = !told && !store.dead;
    failure.textContent = store.dead || (told ? `${told.title} ${told.text}` : "");
  });
  return () => {
    unlisten();
    plot.destroy();
  };
}

// What the saved notebook keeps, a picture and a table, is not shown beside the live view. The
// picture is an image whose address is its source, and so has the id in it.
function hideStill(id) {
  const found = `img[src*="inferkit-${id}"], svg#inferkit-${id}, [data-inferkit="${id}"]`;
  const style = h("style", {}, `.jp-OutputArea-child:has(${found}) { display: none }`);
  document.head.append(style);
  return () => style.remove();
}

// A page that was loaded after the cell had run gets no outputs of it from Jupyter. The JupyterLab
// extension hears this, and puts into the notebook what it lacks.
function passOnOutputs(store, root) {
  return store.listen((what, message) => {
    if (what !== "output") return;
    const { place, mark, output } = message;
    const ask = () => store.ask(mark);
    document.dispatchEvent(new CustomEvent("inferkit-output", { detail: { root, place, mark, output, ask } }));
  });
}

export default () => {
  let store;
  return {
    initialize({ model }) {
      store = createStore(model);
      return () => store.close();
    },
    render({ model, el }) {
      // JupyterLab's shortcuts are for cells: "a" in a prompt makes no new one.
      const root = h("div", { class: "inferkit-panel", "data-lm-suppress-shortcuts": "true" });
      // It also takes a new line and an undo from text boxes in a cell's output, at the box itself.
      root.addEventListener("beforeinput", (event) => event.stopPropagation(), true);
      el.append(root);
      const ends = [view(store, root), passOnOutputs(store, root), hideStill(model.get("_slot"))];
      return () => ends.forEach((end) => end());
    },
  };
};
