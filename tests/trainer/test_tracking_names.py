"""What is sent to MLflow is what MLflow takes: held against MLflow's own validator."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.tracking.names import LONGEST_NAME, fit, fit_title, fit_value, unfit

any_text = st.text(st.characters(), max_size=300) | st.text("a./_x0@ -", max_size=12)


@settings(max_examples=2000, deadline=None)  # the first one imports MLflow
@given(any_text)
@example("recall@1")
@example("")
@example("a/../b")
@example("_x40_")
@example("name\n")
@example("m" * 251)
def test_mlflow_takes_every_name_and_it_can_be_had_back(name):
    from mlflow.utils import validation

    sent = fit(name)
    validation._validate_metric(sent, 1.0, 0, 0)
    validation._validate_param_name(sent)
    validation._validate_tag_name(sent)
    assert 0 < len(sent) <= LONGEST_NAME
    assert validation._validate_length_limit("key", validation.MAX_ENTITY_KEY_LENGTH, sent) == sent
    if len(sent) < LONGEST_NAME:
        assert unfit(sent) == name


@given(any_text, any_text)
def test_names_that_differ_are_sent_as_names_that_differ(one, other):
    assert (fit(one) == fit(other)) == (one == other)


@settings(deadline=None)
@given(any_text | st.text(max_size=600))
def test_mlflow_takes_every_title_and_every_value(text):
    from mlflow.utils.validation import _validate_experiment_name, _validate_tag

    _validate_experiment_name(fit_title(text))
    fit_title(text).encode()
    assert "\0" not in fit_value(text, 5000).encode().decode()
    _validate_tag("key", fit_value(text, 5000))


def test_ordinary_names_stay():
    for name in ("train/loss", "validation/average_accuracy", "task.with.hidden", "top 5: x-y", "größe"):
        assert fit(name) == name
    assert fit("recall@1") == "recall_x40_1"
