"""Files are written whole, wherever they stand and whoever writes at the same time."""

import os
import threading

import pytest

import keras_coatnet
from keras_coatnet.files import whole_file
from keras_coatnet.training import Recipe


def test_threads_that_write_at_once_do_not_meet(tmp_path):
    """Each puts its partial file in place while the other is still writing."""
    path = tmp_path / "note.txt"
    both = threading.Barrier(2, timeout=10)
    failed = []

    def write(text):
        try:
            with whole_file(path) as partial:
                partial.write_text(text)
                both.wait()
                assert partial.read_text() == text
                both.wait()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and path.read_text() in ("one", "two")
    assert os.listdir(tmp_path) == ["note.txt"]


def _save_weights(tiny):
    return keras_coatnet.CoAtNet(tiny, input_shape=(32, 32, 3), classes=2).save_weights


WRITERS = {
    "a.weights.h5": _save_weights,
    "recipe.json": lambda tiny: Recipe(image_size=32).save,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_symbolic_link_keeps_pointing(name, tiny, tmp_path):
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / name
    target.write_bytes(b"old")
    link = tmp_path / name
    link.symlink_to(target)
    WRITERS[name](tiny)(link)
    assert link.is_symlink() and target.stat().st_size > 3
    assert os.listdir(tmp_path / "store") == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_to_a_file_of_another_name_keeps_pointing(name, tiny, tmp_path):
    """As caches name their files by a hash: Keras looks at the ending of what it writes."""
    target, link = tmp_path / "0123abcd", tmp_path / name
    target.write_bytes(b"old")
    link.symlink_to(target)
    WRITERS[name](tiny)(link)
    assert link.is_symlink() and target.stat().st_size > 3
    assert sorted(os.listdir(tmp_path)) == sorted(["0123abcd", name])


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_folder_is_named_and_no_temporary_file(name, tiny, tmp_path):
    path = tmp_path / "missing" / name
    with pytest.raises(ValueError) as caught:
        WRITERS[name](tiny)(path)
    assert str(caught.value).startswith(f"{path} cannot be written: there is no folder")


@pytest.mark.slow
def test_models_saved_by_two_threads_are_whole(tiny, tmp_path, monkeypatch):
    """The second starts when the first has its partial file, as a busy machine may have it."""
    import keras

    model = keras_coatnet.CoAtNet(tiny, input_shape=(32, 32, 3), classes=2)
    path, plain, failed = tmp_path / "a.weights.h5", keras.Model.save_weights, []
    both = threading.Barrier(2, timeout=20)
    one_at_a_time = threading.Lock()

    def slowly(self, filepath, **kwargs):
        with one_at_a_time:  # h5py is not what is tested
            plain(self, filepath, **kwargs)
        both.wait()

    def save():
        try:
            model.save_weights(path)
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(keras.Model, "save_weights", slowly)
    threads = [threading.Thread(target=save) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    keras_coatnet.CoAtNet(tiny, weights=path)
    assert os.listdir(tmp_path) == ["a.weights.h5"]
