// What a page shows, after the # of its address: never sent to a server, and told to Python when the page is opened.
const MARK = "#dpt_nb=";
const opened = location.hash; // JupyterLab tidies the address while the notebook is read

function addressOf(state) {
  const address = new URL(location.href);
  address.searchParams.delete("token");
  address.hash = MARK + encodeURIComponent(state);
  return address.href;
}

async function copied(address) {
  try {
    await navigator.clipboard.writeText(address);
    return true;
  } catch {
    return false; // not allowed here: the address bar has it
  }
}

export default {
  render({ model, el }) {
    const button = document.createElement("button"), told = document.createElement("span");
    Object.assign(button, { type: "button", className: "jupyter-button widget-button", textContent: "copy a link" });
    button.title = "an address that leads to what is shown now";
    told.setAttribute("role", "status");
    el.append(button, " ", told);
    button.addEventListener("click", () => model.send({ kind: "asked" }));
    const heard = async (message) => {
      if (message.kind !== "state") return;
      const address = addressOf(message.state);
      history.replaceState(history.state, "", address);
      told.textContent = (await copied(address)) ? "copied" : "the address of this page leads here now";
    };
    model.on("msg:custom", heard);
    if (opened.startsWith(MARK)) model.send({ kind: "opened", state: decodeURIComponent(opened.slice(MARK.length)) });
    return () => model.off("msg:custom", heard);
  },
};
