"""What is no experiment: files that mean the same as files that were run before.

Seeds belong to the harness, so a seed that the file sets means nothing, wherever it stands: as what a seeding call is
given, as the value of something named a seed, or as a number that nothing but those two read.
"""

import ast
import hashlib
import warnings
from collections.abc import Iterator, Mapping

# torch, numpy, random, jax, lightning; by the last part of the call's name
SEEDING = {
    *("manual_seed", "manual_seed_all", "seed", "seed_all", "seed_everything", "set_seed"),
    *("Random", "RandomState", "default_rng", "SeedSequence", "PCG64", "Philox", "MT19937", "SFC64"),
    *("PRNGKey", "fold_in"),
}
PLAIN = (  # of what an expression may consist whose value is taken for a mere seed: it computes nothing else
    *(ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Dict, ast.UnaryOp, ast.BinOp),
    *(ast.expr_context, ast.unaryop, ast.operator),
)
NOTHING = ast.Constant(value=None)


def signature(files: Mapping[str, bytes]) -> str:
    """Return a digest that comments, docstrings, formatting and seeds of Python files leave unchanged."""
    trees: dict[str, ast.Module] = {}
    for name, content in files.items():
        if name.endswith(".py") and (tree := _parse(content)) is not None:
            trees[name] = tree
    digest = hashlib.sha256()
    try:
        _without_seeds(list(trees.values()))
        meanings = {name: ast.dump(tree).encode("utf-8", "surrogatepass") for name, tree in trees.items()}
    except RecursionError:
        meanings = {}
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + meanings.get(name, files[name]) + b"\0")
    return digest.hexdigest()


def _parse(content: bytes) -> ast.Module | None:
    """Return the tree without docstrings, or None for what is no Python: the run will say what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful literals
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _without_seeds(trees: list[ast.Module]) -> None:
    """Take the seeds out of all trees; they may import from each other."""
    seeds = _Seeds()
    for tree in trees:
        seeds.visit(tree)
    while True:
        read = {name for tree in trees for name in _read(tree)}
        seeds.only = seeds.fed - read
        before = len(seeds.fed), seeds.erased
        for tree in trees:
            seeds.visit(tree)
        if before == (len(seeds.fed), seeds.erased):
            return


def _read(tree: ast.AST) -> Iterator[str]:
    """Yield every name that may be read, a string being one that `getattr` or `globals` could be given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


class _Seeds(ast.NodeTransformer):
    """Erases seeds, and what is assigned to the names `only`."""

    def __init__(self) -> None:
        self.only: set[str] = set()
        self.fed: set[str] = set()  # names that were read in what was erased
        self.erased = 0

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call) and _last(node.value.func) in SEEDING:
            return None
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if _last(node.func) in SEEDING:
            for value in (*node.args, *(keyword.value for keyword in node.keywords)):
                self._erase(value)
            node.args, node.keywords = [], []
        return self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if node.arg is not None and self._is_seed(node.arg, node.value):
            node.value = self._erase(node.value)
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if all(self._is_seed(_last(target), node.value) for target in node.targets):
            node.value = self._erase(node.value)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None and self._is_seed(_last(node.target), node.value):
            node.value = self._erase(node.value)
        return self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        node.values = [
            self._erase(value) if key is not None and self._is_seed(_last(key), value) else value
            for key, value in zip(node.keys, node.values, strict=True)
        ]
        return self.generic_visit(node)

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        positional = [*node.posonlyargs, *node.args]
        pairs = zip(reversed(positional), reversed(node.defaults), strict=False)
        erased = [self._erase(value) if self._is_seed(arg.arg, value) else value for arg, value in pairs]
        node.defaults = erased[::-1]
        node.kw_defaults = [
            self._erase(value) if value is not None and self._is_seed(arg.arg, value) else value
            for arg, value in zip(node.kwonlyargs, node.kw_defaults, strict=True)
        ]
        return self.generic_visit(node)

    def _is_seed(self, name: str, value: ast.expr) -> bool:
        words = name.lower().strip("_").split("_")
        named = words[-1] == "seed" or words[-2:] == ["random", "state"] or name in self.only
        return named and all(isinstance(node, PLAIN) for node in ast.walk(value))

    def _erase(self, value: ast.expr) -> ast.expr:
        self.fed.update(_read(value))
        self.erased += value is not NOTHING
        return NOTHING


def _last(node: ast.expr) -> str:
    """Return the last part of the name that an expression stands for: `seed` of `config.seed` and `config["seed"]`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return name
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            return name
    return ""
