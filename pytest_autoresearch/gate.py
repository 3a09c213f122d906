"""What is no experiment: files that mean the same as files that were run before."""

import ast
import hashlib
from collections.abc import Mapping


def signature(files: Mapping[str, bytes]) -> str:
    """Return a digest that comments, docstrings and formatting of Python files leave unchanged."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + _meaning(name, files[name]) + b"\0")
    return digest.hexdigest()


def _meaning(name: str, content: bytes) -> bytes:
    if not name.endswith(".py"):
        return content
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return content  # the run will say what is wrong with it
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return ast.dump(tree).encode("utf-8", "surrogatepass")


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
