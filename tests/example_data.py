"""Small datasets of every kind, written as their owners would write them."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def png(value=0, size=(8, 8)):
    """An image of one grey, encoded."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(root, *names):
    """Image files, each another grey; returns root."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    return root


def write_tar(path, members):
    """A tar file of {name: bytes}, or of tarfile.TarInfo for what is no plain file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(root, shards=3, examples=4):
    """Shards 00000.tar ... of image, caption and class number, and classnames.txt; returns root."""
    for shard in range(shards):
        members = {}
        for n in range(shard * examples, (shard + 1) * examples):
            members[f"{n:04d}.png"] = png(n)
            members[f"{n:04d}.txt"] = f"caption {n}".encode()
            members[f"{n:04d}.cls"] = str(n % len(CLASSES)).encode()
        write_tar(root / f"{shard:05d}.tar", members)
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def tf_example(**features):
    """A serialized tf.train.Example of bytes and integers."""
    from tensorflow_datasets.proto import tf_example_generated_pb2

    example = tf_example_generated_pb2.Example()
    for name, value in features.items():
        feature = example.features.feature[name.replace("__", "/")]
        kind = feature.int64_list if isinstance(value, int) else feature.bytes_list
        kind.value.append(value)
    return example.SerializeToString()


def write_records(path, records):
    """An ArrayRecord file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def write_record_files(root, files=3, examples=4):
    """x.array_record-00000-of-00003 ... of tf.train.Example; returns root."""
    for number in range(files):
        values = range(number * examples, (number + 1) * examples)
        records = [
            tf_example(image__encoded=png(n), text=b"caption %d" % n, label=n % len(CLASSES))
            for n in values
        ]
        write_records(root / f"x.array_record-{number:05d}-of-{files:05d}", records)
    return root


def hugging_face_table(images, texts, labels):
    """A table as the library datasets writes it: image as struct, features in the schema."""
    import pyarrow as pa

    features = {
        "image": {"_type": "Image"},
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": list(CLASSES), "_type": "ClassLabel"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("text", pa.string()), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = {"image": [{"bytes": i, "path": None} for i in images], "text": texts}
    return pa.table(columns | {"label": labels}, schema)


def write_parquets(root, files=3, examples=4):
    """train-00000-of-00003.parquet ... in row groups of 2; returns root."""
    import pyarrow.parquet as pq

    root.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        values = range(number * examples, (number + 1) * examples)
        labels = [n % len(CLASSES) for n in values]
        table = hugging_face_table(map(png, values), [f"caption {n}" for n in values], labels)
        path = root / f"train-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(table, path, row_group_size=2)
    return root


def write_folders(root, examples=12):
    """A folder for each class; returns root."""
    names = [f"{CLASSES[n % len(CLASSES)]}/{n:04d}.png" for n in range(examples)]
    return write_images(root, *names)


def grey(example):
    """Which grey the image of an example has: its number, in all of these sets."""
    pixels = np.asarray(Image.open(io.BytesIO(example["image"])))
    return int(pixels[0, 0, 0])
