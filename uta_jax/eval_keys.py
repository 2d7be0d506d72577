"""The section ``eval`` of the configuration: what is measured, and on what."""

from ml_collections import ConfigDict

from uta_jax.data import sources


def add_eval(c: ConfigDict) -> None:
    """Every key there is, with its unit."""
    c.eval = ConfigDict()
    c.eval.names = ("zeroshot",)  # keys of evals.EVALUATORS
    c.eval.source = "tfds"  # of the labelled images that are tested
    c.eval.path = ""  # "": nothing is measured
    c.eval.split = "val_single"
    c.eval.batch_size = 256
    c.eval.classnames = ""  # file, one a line, or imagenet; "": the data set's own
    c.eval.templates = ("a photo of a {}.",)
    c.eval.templates_file = ""  # instead: file, one a line, or openai
    # Other data that some evaluators read. What is empty is as above; of fit, as in data.
    for name in ("captions", "masks", "fit"):  # images with captions; with masks; to learn from
        c.eval[name] = ConfigDict({"source": "", "path": "", "split": ""})
    c.eval.window_side = 0  # dense: pixels, of the image's short side; 0: the model's input size
    c.eval.window_stride = 0  # dense: pixels between windows; 0: half a window


def _are_templates(value: tuple) -> bool:
    try:
        return bool(value) and all(template.format("x") != template for template in value)
    except (AttributeError, IndexError, KeyError, ValueError):
        return False


_COUNT_OR_0 = (lambda v: 0 <= v < 2**31), "an integer >= 0"
_KIND = (lambda v: not v or v in sources.SOURCES), 'one of data.source, or ""'

# Key -> (test, what is allowed).
EVAL_RULES = {
    "eval.names": ((lambda v: len(set(v)) == len(v) > 0), "one evaluator or more, none twice"),
    "eval.source": ((lambda v: v in sources.SOURCES), "one of " + ", ".join(sources.SOURCES)),
    "eval.batch_size": ((lambda v: 1 <= v < 2**31), "an integer >= 1"),
    "eval.templates": (_are_templates, "one text or more, each with one {} for the class name"),
    **{f"eval.{name}.source": _KIND for name in ("captions", "masks", "fit")},
    "eval.window_side": _COUNT_OR_0,
    "eval.window_stride": _COUNT_OR_0,
}
