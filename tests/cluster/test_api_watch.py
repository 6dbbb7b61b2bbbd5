"""The contract of watches, on both servers."""

import pytest

from dpmoe_operator.local.apiserver.watching import INITIAL_EVENTS_END


@pytest.fixture
def maps(namespace):
    return f"/api/v1/namespaces/{namespace}/configmaps"


def version_of(http, path):
    return http.get(path)["metadata"]["resourceVersion"]


def seen(events):
    """(type, name) of each event, without the maps that a real cluster adds by itself."""
    found = [(each["type"], each["object"]["metadata"].get("name")) for each in events]
    return [each for each in found if each[1] != "kube-root-ca.crt"]


def test_a_watch_replays_what_happened_since_a_version(http, maps):
    since = version_of(http, maps)
    http.create(maps, {"metadata": {"name": "a"}})
    http.merge(f"{maps}/a", {"data": {"k": "v"}})
    http("DELETE", f"{maps}/a")
    events = http.watch(maps, f"resourceVersion={since}&timeoutSeconds=1")
    assert seen(events) == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]
    versions = [
        int(each["object"]["metadata"]["resourceVersion"])
        for each in events
        if each["object"]["metadata"]["name"] == "a"
    ]
    assert versions == sorted(set(versions))
    assert events[-1]["object"]["data"] == {"k": "v"}


def test_a_watch_without_a_version_starts_with_what_exists(http, maps):
    http.create(maps, {"metadata": {"name": "a"}})
    http.merge(f"{maps}/a", {"data": {"k": "v"}})
    assert seen(http.watch(maps, "timeoutSeconds=1")) == [("ADDED", "a")]


def test_leaving_the_selection_looks_like_a_deletion(http, maps):
    since = version_of(http, maps)
    http.create(maps, {"metadata": {"name": "a", "labels": {"app": "x"}}})
    http.create(maps, {"metadata": {"name": "b", "labels": {"app": "y"}}})
    http.merge(f"{maps}/a", {"metadata": {"labels": {"app": "y"}}})
    left = version_of(http, f"{maps}/a")
    http.merge(f"{maps}/b", {"metadata": {"labels": {"app": "x"}}})
    http.merge(f"{maps}/b", {"data": {"k": "v"}})
    query = f"labelSelector=app%3Dx&resourceVersion={since}&timeoutSeconds=1"
    events = http.watch(maps, query)
    assert seen(events) == [("ADDED", "a"), ("DELETED", "a"), ("ADDED", "b"), ("MODIFIED", "b")]
    gone = events[1]["object"]["metadata"]
    assert (gone["labels"], gone["resourceVersion"]) == ({"app": "x"}, left)


def test_a_watch_of_one_name_sees_only_that(http, maps):
    since = version_of(http, maps)
    for name in ("a", "b"):
        http.create(maps, {"metadata": {"name": name}})
    query = f"fieldSelector=metadata.name%3Db&resourceVersion={since}&timeoutSeconds=1"
    assert seen(http.watch(maps, query)) == [("ADDED", "b")]


def test_a_watch_of_all_namespaces_sees_each(http, maps):
    since = version_of(http, maps)
    http.create(maps, {"metadata": {"name": "a", "labels": {"of": "watch-all"}}})
    query = f"labelSelector=of%3Dwatch-all&resourceVersion={since}&timeoutSeconds=1"
    assert seen(http.watch("/api/v1/configmaps", query)) == [("ADDED", "a")]


def test_initial_events_end_with_a_bookmark(http, maps):
    http.create(maps, {"metadata": {"name": "a"}})
    query = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    events = http.watch(maps, f"{query}&timeoutSeconds=1")
    assert ("ADDED", "a") in seen(events)
    bookmark = next(each["object"] for each in events if each["type"] == "BOOKMARK")
    assert bookmark["kind"] == "ConfigMap"
    assert bookmark["metadata"]["annotations"][INITIAL_EVENTS_END] == "true"
    assert int(bookmark["metadata"]["resourceVersion"]) > 0


def test_initial_events_need_their_match(http, maps):
    assert http("GET", f"{maps}?watch=1&sendInitialEvents=true&timeoutSeconds=1").status == 422


def test_a_watch_can_be_a_stream_of_tables(http, maps):
    http.create(maps, {"metadata": {"name": "a"}})
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
    query = "fieldSelector=metadata.name%3Da&timeoutSeconds=1"
    [event] = http.watch(maps, query, accept=accept)
    assert event["object"]["kind"] == "Table"
    assert event["object"]["rows"][0]["cells"][0] == "a"
    assert event["object"]["rows"][0]["object"]["metadata"]["name"] == "a"
