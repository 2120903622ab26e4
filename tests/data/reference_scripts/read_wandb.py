"""Reads an offline run that `log_with = "wandb"` wrote, with wandb's own classes.

    python read_wandb.py run-XXXXXXXX.wandb            (wandb 0.18 or newer: its protobuf classes)
    python read_wandb.py --datastore run-XXXXXXXX.wandb   (wandb 0.17: its reader too)

Prints the run's name, its config's size, and every history item. Fails on a checksum, a torn record,
an unknown field or a value that is no JSON.
"""

import json
import struct
import sys
import zlib

import wandb
from wandb.proto import wandb_internal_pb2 as protocol

BLOCK = 32768


def pieces(path):
    """Records by the description of the format."""
    data = open(path, "rb").read()
    assert struct.unpack("<4sHB", data[:7]) == (b":W&B", 0xBEE1, 0)
    at, record = 7, b""
    while at < len(data):
        room = BLOCK - at % BLOCK
        if room < 7:
            assert data[at : at + room] == bytes(room)
            at += room
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        assert len(piece) == length and zlib.crc32(bytes([kind]) + piece) == checksum
        record += piece
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
    assert not record


def datastore(path):
    """Records by wandb's reader."""
    from wandb.sdk.internal.datastore import DataStore

    wandb._set_internal_process()
    store = DataStore()
    store.open_for_scan(path)
    while (data := store.scan_data()) is not None:
        yield data


read = datastore if sys.argv[1] == "--datastore" else pieces
for number, data in enumerate(read(sys.argv[-1]), 1):
    record = protocol.Record()
    record.ParseFromString(data)
    size = record.ByteSize()
    record.DiscardUnknownFields()
    assert record.num == number and record.ByteSize() == size == len(data)
    kind = record.WhichOneof("record_type")
    if kind == "run":
        config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        print("run", record.run.run_id, record.run.project, record.run.display_name, len(config))
    elif kind == "history":
        items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        print("history", record.history.step.num, items)
    elif kind not in ("summary", "metric", "header", "exit", "files"):
        sys.exit(f"unexpected record: {kind}")
    else:
        print(kind)
