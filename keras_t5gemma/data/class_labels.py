"""Labels of texts in every accepted form, as arrays."""

import dataclasses
import numbers
from typing import Any

import numpy as np

from keras_t5gemma.utils.checks import number, shown
from keras_t5gemma.utils.texts import column_names, in_memory, to_list


@dataclasses.dataclass(frozen=True)
class LabelReader:
    """Labels of a `TextClassifier`.

    Args:
        kind: `"single_label"`, `"multi_label"` or `"regression"`.
        class_names: names of the classes, or `None` for numbers from 0.
        num_classes: number of classes; `None` for `"regression"`.
    """

    kind: str
    class_names: list | None
    num_classes: Any

    def read(self, y: Any) -> np.ndarray:
        """Labels of texts as an array.

        Args:
            y: any container with a name or number per text; for `"multi_label"` a list
                of them per text, or rows of exactly `num_classes` zeros and ones, or
                a table with a column of zeros and ones for each class.

        Returns:
            int32 `(texts,)`; float32 `(texts, classes)` for `"multi_label"`, and
            `(texts, 1)` for `"regression"`.

        Raises:
            ValueError: for labels that are not accepted, and rows that may be labels
                or zeros and ones.
        """
        y = self._label_rows(y)
        if self.kind == "single_label":
            found = [self._number(label, f"y[{i}]") for i, label in enumerate(y)]
            return np.array(found, "int32")
        if self.kind == "multi_label":
            return self._multi_hot(y)
        try:
            labels = np.asarray(y, "float32")
        except (TypeError, ValueError) as error:
            raise ValueError(f"`y` must be one number per text: {error}") from error
        if labels.size != len(y):
            raise ValueError(
                f"`y` must be one number per text; got shape {labels.shape}."
            )
        bad = np.flatnonzero(~np.isfinite(labels))
        if len(bad):
            raise ValueError(
                f"`y` must be finite numbers; number {bad[0]} is {y[bad[0]]}."
            )
        return labels.reshape(-1, 1)

    def _label_rows(self, y):
        """Labels of any container as a list."""
        names = column_names(y)
        if names is not None and self.kind == "multi_label":
            wanted = self.class_names or names
            if set(wanted) != set(names) or len(names) != self.num_classes:
                raise ValueError(
                    f"`y` must have one column of zeros and ones for each of the "
                    f"classes {self._accepted()}; got the columns {names}."
                )
            columns = [to_list(y[name], "y") for name in wanted]
            rows = list(zip(*columns, strict=True))
            for i, row in enumerate(rows):
                if not _zeros_and_ones(row, self.num_classes):
                    raise ValueError(
                        f"`y` must have zeros and ones in its columns {names}; row {i} "
                        f"is {shown(row)}."
                    )
            return rows
        if names is not None and len(names) == 1:
            y = y[names[0]]
        if self.kind == "single_label" and getattr(y, "shape", ())[1:] == (1,):
            y = np.asarray(y)[:, 0]
        is_rows = isinstance(y, np.ndarray) and y.ndim or isinstance(y, range)
        y = list(y) if is_rows else in_memory(y)
        if not isinstance(y, list | tuple):
            found = f"the columns {names}" if names else type(y).__name__
            raise ValueError(
                f"`y` must be a list of one label per text among {self._accepted()}; "
                f"got {found}."
            )
        return y

    def _multi_hot(self, y):
        """Float32 `(texts, classes)` of lists of labels, or of zeros and ones."""
        labels = np.zeros((len(y), self.num_classes), "float32")
        is_row = [_zeros_and_ones(row, self.num_classes) for row in y]
        names = self.class_names or range(self.num_classes)
        for i, row in enumerate(y):
            if is_row[i] and isinstance(row, np.ndarray):
                labels[i] = row
            elif is_row[i]:
                if not all(is_row) and any(value in names for value in row):
                    raise ValueError(
                        f"`y[{i}]` is {shown(row)}, labels or one number per class: "
                        f"pass {self.num_classes} zeros and ones for every text, or "
                        "for none."
                    )
                labels[i] = row
            elif _is_numbers(row) and len(row) == self.num_classes:
                raise ValueError(f"`y[{i}]` must be zeros and ones; got {row}.")
            elif isinstance(row, list | tuple | set | np.ndarray):
                chosen = [self._number(label, f"y[{i}]") for label in row]
                if len(set(chosen)) < len(chosen):
                    raise ValueError(
                        f"`y[{i}]` must have each label once; got {shown(row)}."
                    )
                labels[i, chosen] = 1
            else:
                raise ValueError(
                    f"`y[{i}]` must be a list of labels among {self._accepted()}, or "
                    f"{self.num_classes} zeros and ones; got {shown(row)}."
                )
        return labels

    def _accepted(self):
        if self.kind == "regression":
            return "finite numbers"
        return self.class_names or f"0..{self.num_classes - 1}"

    def _number(self, label, name="y"):
        if getattr(label, "shape", None) == ():  # A tensor of one number.
            label = np.asarray(label).item()
        if isinstance(label, bytes):  # Of `tf.data` and of NumPy.
            label = label.decode("utf-8", "replace")
        if self.class_names is not None:
            # Others may have no truth value: `pandas.NA`, arrays.
            if isinstance(label, str | numbers.Number | np.bool_):
                if label in self.class_names:
                    return self.class_names.index(label)
        elif isinstance(label, int | np.integer | np.bool_):
            if 0 <= label < self.num_classes:
                return int(label)
        is_float = self.class_names is None and isinstance(label, float | np.floating)
        hint = " Numbers of classes are integers, not floats." if is_float else ""
        names = self.class_names or [0]
        if isinstance(label, int) and all(isinstance(n, str) for n in names):
            hint = " For numbers make the model with `num_classes`, without names."
        elif self.kind == "single_label" and hasattr(label, "__len__"):
            if not isinstance(label, str):
                hint = " Of rows of zeros and ones pass the number of the one."
        if self.kind == "multi_label":
            hint += f" A row of {self.num_classes} zeros and ones is accepted too."
        raise ValueError(
            f"`{name}` must be labels among {self._accepted()}; got {shown(label)}."
            f"{hint}"
        )

    def weights(self, y: Any, class_weight: dict) -> np.ndarray:
        """Weights of texts by their class.

        Args:
            y: as in `read`.
            class_weight: dict of labels and weights; 1 for the others.

        Returns:
            float32 `(texts,)`.

        Raises:
            ValueError: for unknown labels, negative weights, or another `kind`.
        """
        if y is None:
            raise ValueError("`class_weight` needs the labels as `y`; got None.")
        self._check_weights(class_weight)
        table = np.ones(self.num_classes, "float32")
        for label, weight in class_weight.items():
            table[self._number(label, "class_weight")] = weight
        return table[self.read(y)]

    def _check_weights(self, class_weight):
        if self.kind != "single_label" or not isinstance(class_weight, dict):
            raise ValueError(
                "`class_weight` must be a dict of labels and weights, for labels `y` "
                f"of kind 'single_label'; got {shown(class_weight)} for {self.kind!r}."
            )
        for label, weight in class_weight.items():
            number(weight, f"class_weight[{shown(label)}]", at_least=0)

    def beside_arrays(self, y: Any) -> Any:
        """Labels of arrays of ids: arrays and tensors of numbers as they are."""
        kind = getattr(getattr(y, "dtype", None), "kind", "")
        if y is None or (hasattr(y, "shape") and kind not in ("U", "O", "S", "T")):
            return y
        return self.read(y)

    def weights_by_number(self, class_weight: dict) -> dict:
        """Weights by the number of the class, of a dict by name or by number."""
        self._check_weights(class_weight)
        numbers_only = LabelReader(self.kind, None, self.num_classes)
        found = {}
        for label, weight in class_weight.items():
            is_name = self.class_names is not None and label in self.class_names
            is_number = isinstance(label, int | np.integer)
            reader = numbers_only if is_number and not is_name else self
            found[reader._number(label, "class_weight")] = weight
        return found


def _is_numbers(row):
    return isinstance(row, np.ndarray) and row.ndim == 1 and row.dtype.kind in "biuf"


def _zeros_and_ones(row, count):
    """Whether a row of labels is one zero or one for each class."""
    return (
        isinstance(row, list | tuple | np.ndarray)
        and getattr(row, "ndim", 1) == 1
        and len(row) == count
        and all(isinstance(v, numbers.Real | np.bool_) and v in (0, 1) for v in row)
    )
