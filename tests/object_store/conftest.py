"""A real store once for the session, and a bucket for each test."""

import uuid
from collections.abc import Iterator

import pytest
import s3fs
from object_store.stores import Store, ceph, require_ceph

from davir_ray.run.location import Location


@pytest.fixture(scope="session")
def ceph_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    require_ceph()
    with ceph(tmp_path_factory.mktemp("ceph")) as store:
        yield store


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> Store:
    """Each of the stores."""
    store: Store = request.getfixturevalue(f"{request.param}_store")
    return store


@pytest.fixture
def used(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store that this process uses for s3://."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield store
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(store: Store) -> str:
    """A new bucket."""
    return make_bucket(store)


def make_bucket(store: Store) -> str:
    name = f"bucket-{uuid.uuid4().hex[:16]}"
    store.client().call_s3("create_bucket", Bucket=name)
    return name


@pytest.fixture
def place(used: Store, bucket: str) -> Location:
    """A folder of the bucket, which does not exist yet."""
    return Location.of(f"s3://{bucket}/run")
