"""Labelled images to learn from and others to test on, as kNN and linear probes need them."""

from uta_jax import UserError
from uta_jax.evals.features import Pooled
from uta_jax.evals.names import check_labels, class_names
from uta_jax.evals.setting import Setting, needs


def labelled_pair(vision: dict, cfg: Setting) -> tuple[Pooled, Pooled, tuple[str, ...]]:
    """Features to learn from, features to test on, and the names of their common classes.

    Raises:
      UserError: unlabelled data, the same data twice, other classes, or a class without an example
        to learn from.
    """
    fit, test = cfg.data("fit"), cfg.data("test")
    needs(fit, "label", "config.eval.fit")
    classes = class_names(test, cfg.eval.classnames)
    if fit.fingerprint() == test.fingerprint():
        raise UserError(
            "config.eval.fit: these are the very images that are tested; name a training split"
        )
    if fit.class_names and test.class_names and fit.class_names != test.class_names:
        raise UserError(
            f"config.eval.fit: its {len(fit.class_names)} classes are not the "
            f"{len(test.class_names)} of config.eval; both need the same ones, in the same order"
        )
    learnt = cfg.features.pooled(vision, cfg.spec, fit)
    check_labels(learnt.label_n, classes, needs_all="config.eval.fit")
    tested = cfg.features.pooled(vision, cfg.spec, test)
    check_labels(tested.label_n, classes)
    return learnt, tested, classes
