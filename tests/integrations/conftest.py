"""Tiny quantized models, saved once for all tests of a session."""

import functools

import pytest
import torch
from tiny_models import make

import marlin


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(name, dtype) is the directory of a checkpoint that Marlin wrote: not to be changed."""

    @functools.cache
    def save(name="llama", dtype=torch.float32):
        directory = tmp_path_factory.mktemp("saved") / name
        marlin.save_pretrained(make(name, dtype), directory, max_shard_size="30KB")
        return directory

    return save
