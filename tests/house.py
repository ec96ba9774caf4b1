"""The house rules as figures: what a notebook, a cell, a line and an import may be.

`python tests/house.py` prints them.

Every rule is a function of the root of a repository and returns a list of problems, each a line that names a place.
"""
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

WINGS = "core data diffusion theory method evaluation runs baselines likelihood longtail lsdm report batch app dev".split()
EXPERIMENTS = "paper beyond longtail lsdm".split()
PAGES = {"index", "reproduction", "findings"}  # notebooks beside the wings: prose only
REGISTRIES = {"ucdm.runs.registry"}  # modules that may import a later wing by its name
PRINTED = {"ucdm.report.paper"}  # the paper's printed numbers, as long as they are
LONGEST_CELL, LONGEST_LINE = "exported cells, longest", "code lines over 140 characters"
LIMITS = {
    "exported cells, median lines": 12,
    "exported cells, 90th percentile": 35,
    LONGEST_CELL: 60,
    "exported cells with several definitions, %": 10,
    "code lines over 120 characters, %": 3,
    LONGEST_LINE: 0,
    "words a prose cell, median": 35,
}
LONGEST_MODULE = 400
PROGRAMS = {  # requirements that are used without being imported
    "build": "tests/test_package.py",
    "installer": "tests/test_package.py",
    "ipywidgets": "progress bars in notebooks",
    "jupyterlab": "make lab",
    "pytest-timeout": "time limits of the tests",
    "pytest-xdist": "tests in several processes",
    "tabulate": "tables in Markdown, through pandas",
}


# What there is to look at

def notebooks(root):
    "Every notebook, in order of its path."
    found = sorted((root / "nbs").rglob("*.ipynb"))
    return [p for p in found if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts)]


@cache
def cells(notebook, kind, without=None):
    "The sources of a notebook's cells of one kind, those with a tag left out."
    content = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        for cell in content
        if cell["cell_type"] == kind and without not in cell["metadata"].get("tags", [])
    ]


def modules(root):
    "Every module of the package by its dotted name."
    files = [p for p in sorted((root / "ucdm").rglob("*.py")) if p.name != "_modidx.py"]
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


@cache
def tree(file):
    "The syntax tree of a module."
    return ast.parse(file.read_text(encoding="utf-8"))


def python(source):
    "The code of a cell without IPython's own lines."
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in source.splitlines())


def place(file, root): return file.relative_to(root).as_posix()


def wing(module): return module.split(".")[1] if module.count(".") else ""


# Cells and lines

def exported(root):
    "Every exported cell as (notebook, lines, definitions); directives do not count as lines."
    found = []
    for notebook in notebooks(root):
        for source in cells(notebook, "code"):
            if not re.search(r"^#\|\s*exporti?\b", source, re.M): continue
            code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
            body = ast.parse(python(code)).body
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            found.append((notebook, len(code.splitlines()), sum(isinstance(node, kinds) for node in body)))
    return found


def code_lines(root):
    """Every line of code in library and experiments, as (notebook, line).

    Pure comments are no code, and a parameter stays on one line, however long: papermill reads them line by line.
    """
    return [
        (notebook, line)
        for notebook in notebooks(root)
        for source in cells(notebook, "code", without="parameters")
        for line in source.splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]


def prose_words(root):
    "How many words each cell of prose has: headings alone, code blocks, tables and targets of links do not count."
    counts = []
    for notebook in notebooks(root):
        if notebook.parent == root / "nbs": continue
        for source in cells(notebook, "markdown"):
            text = re.sub(r"```.*?```|^\|.*$|\$\$.*?\$\$", "", source, flags=re.S | re.M)
            text = re.sub(r"\]\([^)]*\)", "]", text)
            if re.sub(r"^#+ .*$", "", text, flags=re.M).strip(): counts.append(len(text.split()))
    return counts


def percentile(numbers, fraction):
    ordered = sorted(numbers)
    return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)] if ordered else 0


def figures(root):
    "The figures that have a limit, by their names."
    lengths = [lines for _, lines, _ in exported(root)]
    lines = [len(line) for _, line in code_lines(root)]
    several = sum(definitions > 1 for *_, definitions in exported(root))
    return {
        "exported cells, median lines": statistics.median(lengths or [0]),
        "exported cells, 90th percentile": percentile(lengths, 0.9),
        LONGEST_CELL: max(lengths, default=0),
        "exported cells with several definitions, %": 100 * several / max(len(lengths), 1),
        "code lines over 120 characters, %": 100 * sum(n > 120 for n in lines) / max(len(lines), 1),
        LONGEST_LINE: sum(n > 140 for n in lines),
        "words a prose cell, median": statistics.median(prose_words(root) or [0]),
    }


def over_limits(root):
    "Figures above their limits, but for the longest cell and line, which the next two rules name one by one."
    found = {name: value for name, value in figures(root).items() if name not in (LONGEST_CELL, LONGEST_LINE)}
    return [f"{name}: {value:g}, at most {LIMITS[name]}" for name, value in found.items() if value > LIMITS[name]]


def long_cells(root):
    "Exported cells of more than 60 lines."
    most = LIMITS[LONGEST_CELL]
    return [f"{place(p, root)}: an exported cell of {n} lines" for p, n, _ in exported(root) if n > most]


def long_lines(root):
    "Lines of code of more than 140 characters."
    return [f"{place(p, root)}: {len(line)} characters: {line.strip()[:60]} ..."
            for p, line in code_lines(root) if len(line) > 140]


def long_modules(root):
    "Modules of more than 400 lines."
    counts = {m: len(p.read_text(encoding="utf-8").splitlines()) for m, p in modules(root).items() if m not in PRINTED}
    return [f"{m}: {n} lines, at most {LONGEST_MODULE}" for m, n in counts.items() if n > LONGEST_MODULE]


# Wings and imports

def misplaced(root):
    "Notebooks outside a wing, and those that export to another module than the one their place says."
    problems = []
    for notebook in notebooks(root):
        folder, name = notebook.relative_to(root / "nbs").parent.parts, notebook.stem
        source = "\n".join(cells(notebook, "code"))
        homes = re.findall(r"^#\|\s*default_exp\s+(\S+)", source, re.M)
        strays = re.findall(r"^#\|\s*exporti?[ \t]+(\S+)", source, re.M)
        exports = bool(homes or strays or re.search(r"^#\|\s*exporti?\b", source, re.M))
        if not folder and name in PAGES or len(folder) == 2 and folder[0] == "experiments" and folder[1] in EXPERIMENTS:
            if exports: problems.append(f"{place(notebook, root)}: exports, which only notebooks of a wing do")
            continue
        if len(folder) != 1 or folder[0] not in WINGS:
            problems.append(f"{place(notebook, root)}: lies outside every wing")
            continue
        number, _, room = name.partition("_")
        if not re.fullmatch(r"\d\d", number) or not room:
            problems.append(f"{place(notebook, root)}: has no number that says when it is read")
        allowed = {f"{folder[0]}.{room}", f"{folder[0]}.__init__"}
        problems += [f"{place(notebook, root)}: exports to {home}, not to {folder[0]}.{room}"
                     for home in {*homes, *strays} - allowed]
        if exports and not homes: problems.append(f"{place(notebook, root)}: exports, but names no module")
    return problems


def resolved(node, package):
    "The module that a `from ... import` names, seen from a package given as its parts."
    base = package[:len(package) + 1 - node.level] if node.level else []
    return ".".join(base + (node.module.split(".") if node.module else []))


def imported(module, file, known):
    "Modules of the package that a module imports, at the top, inside a function or by a literal name."
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolved(node, package)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    found = {name for name in found if name in known and name not in ("ucdm", module)}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def arrows(root):
    "Every import between modules of the package, as module -> modules."
    known = modules(root)
    return {module: imported(module, file, known) for module, file in known.items()}


def backward(root):
    "Imports from a later wing."
    order = {name: i for i, name in enumerate(WINGS)}
    return [f"{module} imports {other}, of a later wing" for module, others in arrows(root).items()
            for other in sorted(others) if module not in REGISTRIES
            and order.get(wing(other), -1) > order.get(wing(module), len(order))]


def circles(root):
    "Import circles, each once."
    graph, state, found = arrows(root), {}, []

    def visit(module, path):
        state[module] = "open"
        for other in sorted(graph[module]):
            if state.get(other) == "open": found.append(" -> ".join([*path[path.index(other):], other]))
            elif other not in state: visit(other, [*path, other])
        state[module] = "closed"
    for module in graph:
        if module not in state: visit(module, [module])
    return [f"import circle: {circle}" for circle in found]


def twice(root):
    "What a module defines more than once: the second definition hides the first. A class may have several patches."
    found = []
    for name, file in modules(root).items():
        seen = set()
        for node in tree(file).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            of = next((ast.unparse(a.annotation) for a in node.args.args[:1] if a.annotation), "") if any(
                ast.unparse(d).startswith("patch") for d in node.decorator_list
            ) else ""
            if (key := (of, node.name)) in seen: found.append(f"{name} defines {node.name} twice")
            seen.add(key)
    return found


# Names in strings and prose

_DOTTED = re.compile(r"(?<![\w/.@-])ucdm(?:\.[A-Za-z_]\w*)+(?::[A-Za-z_]\w*)?")
_WITHIN = re.compile(rf"(?:{'|'.join(WINGS)})(?:\.[a-z_]\w*)+(?::[A-Za-z_]\w*)?")
_NUMBERED = re.compile(r"(?<![\w.-])\d\d_[a-z]\w*(?![\w-])")
_NOTEBOOK = re.compile(r"(?<![\w*{}<>%./-])(?:\.\./)*[\w/-]+\.ipynb\b")
_LINK = re.compile(r"\]\(\s*<?([^)\s>#]+)[^)]*\)")
_FILES = set("py ipynb md csv json yml png tex html parquet safetensors ckpt txt log".split())


def names_of(body):
    "Names that statements define or import, those under `if`, `try` and `with` too."
    found = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For)):
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            found |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            for part in ("body", "orelse", "finalbody", "handlers"): found |= names_of(getattr(node, part, []))
    return found


def patched(root):
    "Methods that `@patch` adds to a class, as class -> names."
    found = {}
    for file in modules(root).values():
        for node in tree(file).body:
            if isinstance(node, ast.FunctionDef) and "patch" in " ".join(map(ast.unparse, node.decorator_list)):
                owner = node.args.args[0].annotation if node.args.args else None
                if owner is not None: found.setdefault(ast.unparse(owner).strip("'\""), set()).add(node.name)
    return found


def members(class_node):
    "What a class has by itself: methods, fields, and attributes set on `self`."
    return names_of(class_node.body) | {n.attr for n in ast.walk(class_node)
                                        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


class Names:
    "What the package and the notebooks call things, and which of the names in a text are not among them."

    def __init__(self, root):
        self.root, self.modules, self.patched = root, modules(root), patched(root)
        self.notebooks = {p.stem for p in notebooks(root)}

    def exists(self, name):
        "Whether `ucdm.data.splits.CDMSplit`, or with a colon before the last part, is there."
        parts = name.replace(":", ".").split(".")
        for n in range(len(parts), 0, -1):
            if (module := ".".join(parts[:n])) in self.modules: break
        else: return False
        body = tree(self.modules[module]).body
        if n == len(parts): return True
        if parts[n] not in names_of(body): return False
        owner = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == parts[n]), None)
        if owner is None or n + 1 == len(parts) or owner.bases: return True
        return parts[n + 1] in members(owner) | self.patched.get(owner.name, set())

    def dotted(self, text): return [m[0] for m in _DOTTED.finditer(text) if not self.exists(m[0])]

    def within(self, text):
        "A string that is nothing but a name counted from the package, such as `data.splits.load_dataset`."
        fits = _WITHIN.fullmatch(text) and text.rpartition(".")[2] not in _FILES
        return [text] if fits and not self.exists(f"ucdm.{text}") else []

    def numbered(self, text): return [m[0] for m in _NUMBERED.finditer(text) if m[0] not in self.notebooks]

    def links(self, text, folder):
        "Relative links of Markdown to files that are not there."
        found = [m[1] for m in _LINK.finditer(re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S))]
        local = [link for link in found if not re.match(r"[a-z]+:|/|attachment", link)]
        return [link for link in local if not (folder / link).exists()]

    def paths(self, text, folder):
        "Paths of notebooks, seen from a folder, the root or the notebooks' own folder, that are not there."
        homes, found = (folder, self.root, self.root / "nbs"), [m[0] for m in _NOTEBOOK.finditer(text) if "/" in m[0]]
        return [path for path in found if not any((home / path).exists() for home in homes)]


def strings(source):
    "The strings and comments of Python code; what stands between the braces of an f-string is left out."
    values = [node.value for node in ast.walk(ast.parse(python(source))) if isinstance(node, ast.Constant)]
    tokens = tokenize.generate_tokens(io.StringIO(python(source)).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [value for value in values if isinstance(value, str)], [c for c in comments if not c.startswith("#|")]


def missing_names(root):
    "Modules, definitions, notebooks and files that a string, a comment or a text names and that do not exist."
    names, problems = Names(root), []

    def note(file, found): problems.extend(f"{place(file, root)}: there is no {name}" for name in dict.fromkeys(found))

    def code(file, source):
        texts, comments = strings(source)
        note(file, [name for text in texts + comments for name in names.dotted(text) + names.numbered(text)])
        return texts
    for notebook in notebooks(root):
        for source in cells(notebook, "code"):
            texts = code(notebook, source)
            note(notebook, [n for text in texts for n in names.within(text) + names.paths(text, notebook.parent)])
        for source in cells(notebook, "markdown"):
            note(notebook, names.dotted(source) + names.numbered(source) + names.links(source, notebook.parent))
    for file in sorted((root / "tests").glob("*.py")):
        if file.name not in ("house.py", "test_house.py"): code(file, file.read_text(encoding="utf-8"))
    for file in [*sorted(root.glob("*.md")), *sorted((root / "ucdm").rglob("*.md"))]:
        text = file.read_text(encoding="utf-8")
        note(file, names.dotted(text) + names.numbered(text) + names.links(text, file.parent))
    for file in [root / "Makefile", root / "settings.ini", *sorted((root / ".github").rglob("*.yml"))]:
        if file.exists(): note(file, names.dotted(file.read_text(encoding="utf-8")))
    return problems + missing_keys(root) + missing_in_sidebar(root)


def missing_imports(root):
    "Names that a module, a notebook or a test imports from the package and that are not there."
    names, known, problems = Names(root), modules(root), []
    sources = [(m, p, tree(p)) for m, p in known.items()]
    sources += [("", p, ast.parse(python(s))) for p in notebooks(root) for s in cells(p, "code")
                if not re.search(r"^#\|\s*exporti?\b", s, re.M)]
    sources += [("", p, tree(p)) for p in sorted((root / "tests").glob("*.py"))]
    for module, file, content in sources:
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        for node in ast.walk(content):
            if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
            wanted = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom): wanted = [f"{resolved(node, package)}.{name}" for name in wanted]
            wanted = [name.removesuffix(".*") for name in wanted if name.split(".")[0] == "ucdm"]
            missing = [name for name in wanted if not names.exists(name)]
            problems += [f"{place(file, root)}: there is no {name} to import" for name in missing]
    return problems


def parameter_names(notebook):
    "The parameters of an experiment."
    return {m[1] for source in cells(notebook, "code") for m in re.finditer(r"^([a-z_]\w*) = .*  # ", source, re.M)}


def missing_keys(root):
    "Experiments and parameters that a profile sets and that do not exist."
    problems, known = [], {p.stem: parameter_names(p) for p in (root / "nbs" / "experiments").rglob("*.ipynb")}
    for file in sorted((root / "nbs" / "experiments" / "profiles").glob("*.yml")):
        profile = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        entries = (profile.get("notebooks") or {}).items()
        wanted = {name: (entry or {}).get("parameters") or {} for name, entry in entries}
        missing = [f"experiment {name}" for name in wanted if name not in known]
        missing += [f"parameter {key} of {name}" for name, keys in wanted.items() for key in keys
                    if name in known and key not in known[name]]
        problems += [f"{place(file, root)}: there is no {name}" for name in missing]
    return problems


def missing_in_sidebar(root):
    "Entries of the sidebar and the bar above the pages that match no notebook."
    return [
        f"{place(file, root)}: there is no {entry}"
        for file in (root / "nbs" / "sidebar.yml", root / "nbs" / "_quarto.yml") if file.exists()
        for entry in re.findall(r"[\w*/-]+\.ipynb", file.read_text(encoding="utf-8"))
        if not list((root / "nbs").glob(entry))
    ]


# Text files

def text_without_encoding(call):
    "Whether a call reads or writes text in an encoding that differs from system to system."
    name, keywords = getattr(call.func, "attr", getattr(call.func, "id", "")), {k.arg: k.value for k in call.keywords}
    if keywords.keys() & {"encoding", None}: return False
    if name in ("read_text", "write_text"): return len(call.args) < (1 if name == "read_text" else 2)
    if name != "open": return False
    method = isinstance(call.func, ast.Attribute)
    mode = [*call.args[0 if method else 1:][:1], *(node for name, node in keywords.items() if name == "mode")]
    modes = [c.value for m in mode for c in ast.walk(m) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    if not method: return not mode or any("b" not in m for m in modes)
    # other classes have an `open`, too: that of a path has a mode or nothing
    return not (call.args or keywords) or any(re.fullmatch(r"[rwaxt+]+", m) for m in modes)


def sources(root):
    "Every piece of code that a person writes, as (file, source); those of notebooks are cells."
    found = [(p, python(source)) for p in notebooks(root) for source in cells(p, "code")]
    files = [*sorted((root / "tests").glob("*.py")), *root.glob("setup.py")]
    return found + [(p, p.read_text(encoding="utf-8")) for p in files]


def without_encoding(root):
    "Text that is read or written without saying how, which is UTF-8 on one system and something else on another."
    return [
        f"{place(file, root)}: name the encoding: {ast.unparse(node)[:100]}"
        for file, source in sources(root) for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and text_without_encoding(node)
    ]


# Requirements

def normal(name): return re.sub(r"[-_.]+", "-", name).lower()


def requirements(root):
    "The names of what settings.ini requires, list by list."
    file = root / "settings.ini"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lists = re.findall(r"^(\w*requirements) *=(.*)$", text, re.M)
    return {name: {normal(re.match(r"[\w.-]+", item)[0]) for item in items.split()} for name, items in lists}


def foreign_imports(source):
    "The packages outside the standard library that some code imports."
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"ucdm"}


def needed(root):
    """What is imported, as (package, file) for each: by those who use it, and by those who work on it.

    Users have the modules and the experiments. The wing `dev`, the tests and what a library notebook shows is for
    developers.
    """
    users, developers, own = set(), set(), {p.stem for p in (root / "tests").glob("*.py")}
    for name, file in modules(root).items():
        found = users if wing(name) != "dev" else developers
        found |= {(package, file) for package in foreign_imports(file.read_text(encoding="utf-8"))}
    for file, source in sources(root):
        found = users if root / "nbs" / "experiments" in file.parents else developers
        found |= {(package, file) for package in foreign_imports(source) - own}
    return users, developers


def undeclared(root):
    "Imports that settings.ini does not require, and requirements that nothing imports."
    if not (lists := requirements(root)): return []
    known, (users, developers) = packages_distributions(), needed(root)
    def names(package): return {normal(name) for name in known.get(package, [package])}
    theirs = set().union(*(required for kind, required in lists.items() if kind != "dev_requirements")) # extras too
    problems = [
        f"{place(file, root)}: {package} is not among the {kind} of settings.ini"
        for imports, required, kind in ((users, theirs, "requirements"),
                                        (developers, set.union(*lists.values()), "dev_requirements"))
        for package, file in sorted(imports) if not names(package) & required
    ]
    used = {name for package, _ in users for name in names(package)} | PROGRAMS.keys()
    everywhere = used | {name for package, _ in developers for name in names(package)}
    return problems + [
        f"settings.ini: nothing imports {name}, one of the {kind}"
        for kind, required in lists.items()
        for name in sorted(required - (used if kind == "requirements" else everywhere))
    ]


RULES = [over_limits, long_cells, long_lines, long_modules, misplaced, twice, circles, backward, missing_names,
         missing_imports, without_encoding, undeclared]


def check(root):
    "All problems, rule by rule."
    return [problem for rule in RULES for problem in rule(root)]


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    for name, value in figures(root).items(): print(f"{name:45} {value:8.4g}   at most {LIMITS[name]}")
    print(f"{'prose cells':45} {len(prose_words(root)):8}")
    print(f"{'exported cells':45} {len(exported(root)):8}")
    print(f"{'modules':45} {len(modules(root)):8}   at most {LONGEST_MODULE} lines each")
    problems = check(root)
    print(*problems, f"{len(problems)} problems", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
