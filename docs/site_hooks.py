"""What the site makes by itself: the API reference from the public names, the gallery of reports.

mkdocs runs this file; ``mkdocs build`` from the repository's root makes the site.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "dtype": "bfloat16",
}
GALLERY = {
    "turboconn": "{pass: turboconn, preset: llama-1b}",
    "loop": "{pass: loop, start: 4, end: 8, times: 3}",
    "parallel-loop": "{pass: parallel_loop}",
    "mixture-of-recursions": "{pass: mixture_of_recursions, recursions: 2, start: 1}",
    "inner-thinking": "{pass: inner_thinking}",
    "mixture-of-depths": "{pass: mixture_of_depths}",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the marks of the API page and of the gallery."""
    if page.file.src_uri == "api.md":
        for mark, lines in (("names", _names), ("passes", _passes), ("recipes", _recipes), ("tasks", _tasks)):
            markdown = markdown.replace(f"<!-- {mark} -->", "\n\n".join(lines()))
        return markdown
    if page.file.src_uri == "gallery.md":
        style = "width:100%;height:640px;border:1px solid #8884"
        frames = [
            f'## {name}\n\n<p><code>{spec}</code>, <a href="../reports/{name}.html">the page by itself</a></p>\n'
            f'<iframe src="../reports/{name}.html" title="report of {name}" style="{style}">'
            "</iframe>"
            for name, spec in GALLERY.items()
        ]
        return markdown.replace("<!-- gallery -->", "\n\n".join(frames))
    return markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Write the reports of the gallery."""
    from depthpass.report.subject import Subject

    folder, subject = Path(config["site_dir"]) / "reports", Subject.of(LLAMA)
    folder.mkdir(exist_ok=True)
    for name, spec in GALLERY.items():
        page = subject.report(spec, seq_len=155, batch=8).to_html()
        (folder / f"{name}.html").write_text(page, encoding="utf-8")


def _names() -> list[str]:
    """Public functions and classes that are no passes or errors, by the module that defines them."""
    import depthpass as dp
    from depthpass.passes.base import Pass

    directives = []
    for name in dir(dp):
        value = inspect.unwrap(getattr(dp, name)) if not name.startswith("_") else None
        # The function that stands behind a package of the same name, as dp.report.
        value = getattr(value, name, value) if inspect.ismodule(value) else value
        ours = getattr(value, "__module__", "").startswith("depthpass")
        if not ours or not callable(value) or (isinstance(value, type) and issubclass(value, Pass | Exception)):
            continue
        directives.append(f"::: {value.__module__}.{value.__name__}")
    return directives


def _recipes() -> list[str]:
    from depthpass import recipes

    return [f"::: depthpass.recipes.{name}" for name, value in sorted(vars(recipes).items())
            if not name.startswith("_") and getattr(value, "__module__", "") == "depthpass.recipes"]


def _tasks() -> list[str]:
    from depthpass import tasks

    values = {getattr(tasks, name) for name in tasks.__all__ if callable(getattr(tasks, name))}
    return sorted(f"::: {value.__module__}.{value.__name__}" for value in values)


def _passes() -> list[str]:
    from depthpass.passes.registry import BUILTIN

    return [f"::: {target.replace(':', '.')}" for _, target in sorted(BUILTIN.items())]
