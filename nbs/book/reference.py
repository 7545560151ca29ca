"""The reference of the library, from its source: signatures, and beside each parameter the comment that says its shape,
unit or range. Nothing is imported, so the book needs neither torch nor the library."""

import ast
import io
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from pages import from_the_top, write

FENCE = "`" * 8
LONGEST_VALUE = 120  # characters of a constant that are shown


@dataclass
class Thing:
    "A function, class, method, property or constant, as it is described."

    kind: str  # the directive of Sphinx's Python domain
    name: str
    signature: str = ""
    said: str = ""  # docstring
    fields: list[tuple[str, str]] = field(default_factory=list)  # ":param int size:" and its comment
    options: list[tuple[str, str]] = field(default_factory=list)  # of the directive
    inside: list["Thing"] = field(default_factory=list)  # methods


def comments_of(source: str) -> dict[int, str]:
    "The comment that ends each line, without its sign; those for tools are left out."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# %%", "#|")):
            found[token.start[0]] = token.string.lstrip("#").split("# noqa")[0].strip()
    return {line: comment for line, comment in found.items() if not comment.startswith(("noqa", "type:"))}


def own_line(source: list[str], line: int) -> bool:
    "Whether a line holds a comment and nothing else."
    return source[line - 1].lstrip().startswith("#")


@dataclass
class Module:
    "A module's syntax tree, its comments and its lines."

    name: str
    source: str

    def __post_init__(self):
        self.tree = ast.parse(self.source)
        self.comments, self.lines = comments_of(self.source), self.source.splitlines()

    def beside(self, node: ast.AST) -> str:
        "The comment at the end of a parameter's last line, after those on lines of their own above it."
        words, line = [self.comments.get(node.end_lineno, "")], node.lineno - 1
        while line > 0 and line in self.comments and own_line(self.lines, line):
            words.insert(0, self.comments[line])
            line -= 1
        return " ".join(filter(None, words))

    def public(self) -> list[str]:
        "The names of `__all__`, in its order."
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                return ast.literal_eval(node.value)
        return []


def decorators(node) -> list[str]:
    "The names of decorators, without arguments and modules."
    plain = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
    return [ast.unparse(one).split(".")[-1] for one in plain]


def parameters(node: ast.FunctionDef, bound: bool) -> list[ast.arg]:
    "All parameters of a function; of a method without the first."
    own = node.args
    given = [*own.posonlyargs, *own.args][1 if bound else 0 :]
    return [*given, *filter(None, [own.vararg]), *own.kwonlyargs, *filter(None, [own.kwarg])]


def signature(node: ast.FunctionDef, bound: bool, returns: bool = True) -> str:
    "How a function is called, with defaults and types."
    own = ast.arguments(**{name: getattr(node.args, name) for name in ast.arguments._fields})
    if bound:
        first = "posonlyargs" if own.posonlyargs else "args"
        setattr(own, first, getattr(own, first)[1:])
        own.defaults = own.defaults[-len(own.posonlyargs + own.args) :] if own.posonlyargs + own.args else []
    answer = f" -> {ast.unparse(node.returns)}" if returns and node.returns else ""
    return f"({ast.unparse(own)}){answer}"


def parameter_fields(module: Module, node: ast.FunctionDef, bound: bool) -> list[tuple[str, str]]:
    "A field for each parameter, and one for what comes back; none where nothing is said of any."
    given, fields, said = parameters(node, bound), [], []
    for argument in given:
        alone = sum(other.end_lineno == argument.end_lineno for other in given) == 1
        words = module.beside(argument) if alone and argument.end_lineno != node.lineno else ""
        said.append(words)
        fields.append((f":param {argument.arg}:", words))
        if argument.annotation:
            fields.append((f":type {argument.arg}:", ast.unparse(argument.annotation)))
    if node.returns and (answer := module.comments.get(node.returns.end_lineno, "")):
        fields.append((":returns:", answer))
        said.append(answer)
    return fields if any(said) else []


def function(module: Module, node: ast.FunctionDef, kind: str = "function", bound: bool = False) -> Thing:
    "A function or method, with its parameters."
    marks, options = decorators(node), []
    if kind == "method":
        if "property" in marks or "cached_property" in marks:
            answer = [("type", ast.unparse(node.returns))] if node.returns else []
            return Thing("property", node.name, said=docstring(node), options=answer)
        options = [(mark, "") for mark in ("classmethod", "staticmethod") if mark in marks]
        bound = "staticmethod" not in marks
    called, fields = signature(node, bound), parameter_fields(module, node, bound)
    return Thing(kind, node.name, called, docstring(node), fields, options)


def docstring(node) -> str:
    return ast.get_docstring(node) or ""


def is_shown(name: str) -> bool:
    return not name.startswith("_") or name == "__call__"


def class_of(module: Module, node: ast.ClassDef, patched: list[ast.FunctionDef]) -> Thing:
    "A class: how it is made, its fields, its methods, and those that are added to it further down the page."
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    made = Thing("class", node.name, said=docstring(node))
    for start in methods:
        if start.name == "__init__":
            made.signature = signature(start, True, returns=False)
            made.fields = parameter_fields(module, start, True)
    values = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
    if values and not made.signature:
        shown = [one for one in values if is_shown(one.target.id)]
        if "dataclass" in decorators(node):
            made.signature = "(" + ", ".join(ast.unparse(one) for one in shown) + ")"
        for one in shown:
            made.fields.append((f":param {one.target.id}:", module.beside(one)))
            made.fields.append((f":type {one.target.id}:", ast.unparse(one.annotation)))
    made.inside = [function(module, one, "method") for one in [*methods, *patched] if is_shown(one.name)]
    bases = [ast.unparse(base) for base in node.bases]
    if bases:
        made.said = f"{made.said}\n\nBases: `{'`, `'.join(bases)}`".strip()
    return made


def constant(module: Module, node: ast.Assign | ast.AnnAssign, name: str) -> Thing:
    "A constant with its value, where that is short."
    value, options = ast.unparse(node.value) if node.value else "", []
    if len(value) <= LONGEST_VALUE:
        options.append(("value", value))
    return Thing("data", name, said=module.comments.get(node.end_lineno, ""), options=options)


def described(module: Module) -> list[Thing]:
    "What a module gives, in the order of `__all__`; methods that stand apart from their class are found with it."
    definitions, patches = {}, {}
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef) and any(mark.startswith("patch") for mark in decorators(node)):
            first = [*node.args.posonlyargs, *node.args.args][0]
            patches.setdefault(ast.unparse(first.annotation), []).append(node)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        definitions[name.id] = node
    things = []
    for name in module.public():
        node = definitions.get(name)
        if isinstance(node, ast.FunctionDef):
            things.append(function(module, node))
        elif isinstance(node, ast.ClassDef):
            things.append(class_of(module, node, patches.pop(name, [])))
        elif node is not None:
            things.append(constant(module, node, name))
    for owner, nodes in patches.items():  # methods of a class that another module defines
        for node in nodes:
            if is_shown(node.name):
                thing = function(module, node, "method")
                things.append(Thing("method", f"{owner}.{node.name}", *list(vars(thing).values())[2:]))
    return things


def directive(thing: Thing, depth: int = 0) -> str:
    "A thing in MyST's words for Sphinx's Python domain."
    fence = FENCE[depth:]
    lines = [f"{fence}{{py:{thing.kind}}} {thing.name}{thing.signature}"]
    lines += [f":{name}: {value}".rstrip() for name, value in thing.options]
    lines += ["", thing.said, ""]
    lines += [f"{name} {words}".rstrip() for name, words in thing.fields]
    lines += ["", *(directive(one, depth + 1) for one in thing.inside), fence, ""]
    return "\n".join(lines)


def module_page(module: Module, notebook: str) -> str:
    "A page for a module."
    said = docstring(module.tree)
    start = f"# {module.name}\n\n```{{py:module}} {module.name}\n```\n\n{said}\n\n"
    start += f"Explained, shown and tested in [{Path(notebook).stem}](/{notebook}).\n\n"
    start += f"```{{py:currentmodule}} {module.name}\n```\n\n"
    return from_the_top(start + "\n".join(map(directive, described(module))), notebook)


def write_reference(
    root: Path,  # of the repository
    out: Path,  # folder of pages, for Sphinx
    library: str,  # the library's name
    notebooks: dict[str, str],  # module, without the library's name → its notebook, from nbs/
) -> tuple[list[str], list[Path]]:  # pages for the table of contents; all files that were written
    "A page for each module, and one for each wing that lists them."
    wings, written = {}, []
    for name, notebook in notebooks.items():
        place = name.replace(".", "/")
        module = Module(f"{library}.{name}", (root / library / f"{place}.py").read_text(encoding="utf-8"))
        written.append(write(out / "api" / f"{place}.md", module_page(module, notebook)))
        wings.setdefault(name.split(".")[0], {})[name] = module
    listed = []
    for wing, modules in wings.items():
        own = f"api/{wing}"
        listed.append(own)
        if wing in modules:  # a wing of one module
            continue
        rows = [
            f"- {{py:mod}}`{module.name}`: {from_the_top(docstring(module.tree), notebooks[name])}"
            for name, module in modules.items()
        ]
        inside = "\n".join(f"{name.split('.')[-1]} </api/{name.replace('.', '/')}>" for name in modules)
        text = f"# {library}.{wing}\n\n" + "\n".join(rows) + f"\n\n```{{toctree}}\n:hidden:\n\n{inside}\n```\n"
        written.append(write(out / f"{own}.md", text))
    return listed, written
