"""The contract of built-in objects, on the embedded API server and on a real one."""

import json
import urllib.parse

import pytest

from dpmoe_operator.local.apiserver.patches import (
    APPLY_PATCH,
    JSON_PATCH,
    MERGE_PATCH,
    STRATEGIC_PATCH,
)


@pytest.fixture
def maps(namespace):
    return f"/api/v1/namespaces/{namespace}/configmaps"


def config_map(name="one", **more):
    return {"metadata": {"name": name}, "data": {"key": "value"}, **more}


def refused(answer, code, reason):
    """Asserts a Status with this code and reason."""
    assert answer.status == code, answer
    assert answer.body["kind"] == "Status"
    assert (answer.body["status"], answer.body["code"]) == ("Failure", code)
    assert answer.body.get("reason", "") == reason
    return answer.body


# Access and discovery


def test_a_wrong_token_is_unauthorized(http, maps):
    refused(http("GET", maps, token="wrong"), 401, "Unauthorized")


def test_probes_and_version_need_no_token(http):
    assert http("GET", "/readyz", token="wrong").status in (200, 401)
    assert http("GET", "/readyz").body == "ok"
    assert http.get("/version")["major"] == "1"


def test_the_core_group_is_discovered(http):
    assert http.get("/api")["versions"] == ["v1"]
    found = {each["name"]: each for each in http.get("/api/v1")["resources"]}
    assert found["pods"]["kind"] == "Pod"
    assert found["pods"]["namespaced"] is True
    assert found["pods"]["shortNames"] == ["po"]
    assert {"get", "list", "watch", "create", "patch"} <= set(found["pods"]["verbs"])
    assert {"pods/status", "pods/log", "pods/binding"} <= set(found)
    assert found["namespaces"]["namespaced"] is False


@pytest.mark.parametrize("path", ["/version", "/api", "/api/v1", "/apis", "/apis/batch"])
def test_discovery_may_end_with_a_slash(http, path):
    assert http.get(f"{path}/").keys() == http.get(path).keys()


@pytest.mark.parametrize(
    ("group_version", "plural", "kind"),
    [
        ("batch/v1", "jobs", "Job"),
        ("coordination.k8s.io/v1", "leases", "Lease"),
        ("events.k8s.io/v1", "events", "Event"),
        ("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy"),
        ("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole"),
        ("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition"),
        ("authorization.k8s.io/v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview"),
        (
            "admissionregistration.k8s.io/v1",
            "validatingadmissionpolicies",
            "ValidatingAdmissionPolicy",
        ),
    ],
)
def test_other_groups_are_discovered(http, group_version, plural, kind):
    group, version = group_version.split("/")
    listed = {each["name"]: each for each in http.get("/apis")["groups"]}[group]
    assert listed["preferredVersion"]["groupVersion"] == group_version
    assert {"groupVersion": group_version, "version": version} in listed["versions"]
    assert http.get(f"/apis/{group}")["preferredVersion"]["version"] == version
    document = http.get(f"/apis/{group_version}")
    assert (document["kind"], document["groupVersion"]) == ("APIResourceList", group_version)
    assert {each["name"]: each["kind"] for each in document["resources"]}[plural] == kind


def test_openapi_lists_a_document_per_version(http):
    paths = http.get("/openapi/v3")["paths"]
    document = http.get(paths["apis/batch/v1"]["serverRelativeURL"])
    patch = document["paths"]["/apis/batch/v1/namespaces/{namespace}/jobs/{name}"]["patch"]
    assert patch["x-kubernetes-group-version-kind"]["kind"] == "Job"
    assert "fieldValidation" in {each["name"] for each in patch["parameters"]}


def test_an_unknown_resource_is_not_found(http, namespace):
    refused(http("GET", f"/api/v1/namespaces/{namespace}/nothings"), 404, "NotFound")
    assert http("GET", "/apis/no.such.group/v1/things").status == 404


def test_access_reviews_allow_the_administrator(http):
    review = {"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}}
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    assert http.create(path, review)["status"]["allowed"] is True


# Create


def test_create_fills_in_what_the_server_owns(http, maps, namespace):
    created = http.create(maps, config_map())
    assert (created["kind"], created["apiVersion"]) == ("ConfigMap", "v1")
    metadata = created["metadata"]
    assert metadata["namespace"] == namespace
    assert len(metadata["uid"]) == 36
    assert metadata["creationTimestamp"].endswith("Z")
    assert int(metadata["resourceVersion"]) > 0
    assert http.get(f"{maps}/one")["data"] == {"key": "value"}


def test_resource_versions_increase(http, maps):
    first, second = (http.create(maps, config_map(name)) for name in ("one", "two"))
    assert int(first["metadata"]["resourceVersion"]) < int(second["metadata"]["resourceVersion"])


def test_create_again_already_exists(http, maps):
    http.create(maps, config_map())
    body = refused(http("POST", maps, config_map()), 409, "AlreadyExists")
    assert body["message"] == 'configmaps "one" already exists'
    assert body["details"]["name"] == "one"


def test_generate_name_appends_to_the_prefix(http, maps):
    names = {
        http.create(maps, {"metadata": {"generateName": "some-"}})["metadata"]["name"]
        for _ in range(3)
    }
    assert len(names) == 3
    assert all(name.startswith("some-") and len(name) == 10 for name in names)


def test_create_into_a_missing_namespace_is_not_found(http):
    answer = http("POST", "/api/v1/namespaces/no-such/configmaps", config_map())
    assert refused(answer, 404, "NotFound")["details"]["kind"] == "namespaces"


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        ({"metadata": {}}, 422, "Invalid"),
        ({"metadata": {"name": "Upper_Case"}}, 422, "Invalid"),
        ({"metadata": {"name": "ok", "labels": {"a": "not allowed"}}}, 422, "Invalid"),
        ({"metadata": {"name": "ok", "namespace": "another"}}, 400, "BadRequest"),
        ({"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "ok"}}, 400, "BadRequest"),
        ({"kind": "ConfigMap", "apiVersion": "v2", "metadata": {"name": "x"}}, 400, "BadRequest"),
        (b"{broken", 400, "BadRequest"),
        ({"metadata": {"name": "ok", "resourceVersion": "1"}}, 500, ""),
    ],
)
def test_create_refuses_malformed_objects(http, maps, body, code, reason):
    refused(http("POST", maps, body), code, reason)


def test_create_refuses_other_formats(http, maps):
    answer = http("POST", maps, b"text", content_type="text/plain")
    refused(answer, 415, "UnsupportedMediaType")


def test_too_large_objects_are_refused(http, maps):
    """etcd's limit of 1.5 MiB on an object, and the server's of 3 MiB on a body."""
    big = {"metadata": {"name": "big"}, "data": {"key": "x" * 2_000_000}}
    assert http("POST", maps, big).status >= 400
    huge = {"metadata": {"name": "huge"}, "data": {"key": "x" * 3_500_000}}
    refused(http("POST", maps, huge), 413, "RequestEntityTooLarge")
    assert http.get(maps)["metadata"].get("continue", "") == ""
    assert http("GET", f"{maps}/big").status == 404


def test_dry_run_creates_nothing(http, maps):
    answer = http("POST", f"{maps}?dryRun=All", config_map())
    assert answer.status == 201
    assert answer.body["metadata"]["uid"]
    assert http("GET", f"{maps}/one").status == 404
    refused(http("POST", f"{maps}?dryRun=Some", config_map()), 422, "Invalid")


def test_secrets_encode_string_data(http, namespace):
    path = f"/api/v1/namespaces/{namespace}/secrets"
    created = http.create(path, {"metadata": {"name": "s"}, "stringData": {"key": "value"}})
    assert created["data"] == {"key": "dmFsdWU="}
    assert created["type"] == "Opaque"
    assert "stringData" not in created


def test_immutable_config_maps_keep_their_data(http, maps):
    http.create(maps, config_map(immutable=True))
    patch = {"data": {"key": "other"}}
    refused(http("PATCH", f"{maps}/one", patch, content_type=MERGE_PATCH), 422, "Invalid")
    http.merge(f"{maps}/one", {"metadata": {"labels": {"a": "b"}}})


# Get and list


def test_get_of_a_missing_object_is_not_found(http, maps):
    body = refused(http("GET", f"{maps}/none"), 404, "NotFound")
    assert body["details"] == {"name": "none", "kind": "configmaps"}


def test_list_has_a_kind_and_a_version(http, maps):
    created = http.create(maps, config_map())
    found = http.get(maps)
    assert (found["kind"], found["apiVersion"]) == ("ConfigMapList", "v1")
    version = int(found["metadata"]["resourceVersion"])
    assert version >= int(created["metadata"]["resourceVersion"])
    assert "one" in [each["metadata"]["name"] for each in found["items"]]


def test_list_of_a_missing_namespace_is_empty(http):
    assert http.get("/api/v1/namespaces/no-such/configmaps")["items"] == []


def test_list_of_all_namespaces_shows_the_object(http, maps, namespace):
    http.create(maps, config_map())
    found = http.get("/api/v1/configmaps?fieldSelector=metadata.name%3Done")["items"]
    assert namespace in [each["metadata"]["namespace"] for each in found]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("app=a", ["x"]),
        ("app==a,tier=1", ["x"]),
        ("app!=a", ["y", "z"]),
        ("app in (a,b)", ["x", "y"]),
        ("app notin (a)", ["y", "z"]),
        ("app", ["x", "y"]),
        ("!app", ["z"]),
        ("tier>0", ["x", "z"]),
        ("app in (a,b),tier", ["x"]),
    ],
)
def test_label_selectors_select(http, maps, selector, expected):
    for name, labels in (
        ("x", {"app": "a", "tier": "1", "of": "test"}),
        ("y", {"app": "b", "of": "test"}),
        ("z", {"tier": "2", "of": "test"}),
    ):
        http.create(maps, {"metadata": {"name": name, "labels": labels}})
    query = urllib.parse.quote(f"of=test,{selector}")
    found = http.get(f"{maps}?labelSelector={query}")["items"]
    assert [each["metadata"]["name"] for each in found] == expected


def test_field_selectors_select(http, maps):
    for name in ("x", "y"):
        http.create(maps, config_map(name))
    assert len(http.get(f"{maps}?fieldSelector=metadata.name%3Dx")["items"]) == 1
    others = http.get(f"{maps}?fieldSelector=metadata.name%21%3Dx")["items"]
    assert "x" not in [each["metadata"]["name"] for each in others]


@pytest.mark.parametrize("query", ["labelSelector=a%3D%3D%3Db", "fieldSelector=spec.x%3D1"])
def test_unreadable_selectors_are_bad_requests(http, maps, query):
    refused(http("GET", f"{maps}?{query}"), 400, "BadRequest")


def test_pods_are_selected_by_phase_and_node(http, namespace):
    pods = f"/api/v1/namespaces/{namespace}/pods"
    for name in ("a", "b"):
        http.create(pods, pod(name))
    http.merge(f"{pods}/a/status", {"status": {"phase": "Running"}})
    found = http.get(f"{pods}?fieldSelector=status.phase%3DRunning")["items"]
    assert [each["metadata"]["name"] for each in found] == ["a"]
    assert len(http.get(f"{pods}?fieldSelector=spec.nodeName%3D")["items"]) == 2


def test_lists_come_in_pages(http, maps):
    for name in "abcde":
        http.create(maps, {"metadata": {"name": name, "labels": {"of": "test"}}})
    names, versions, token = [], set(), ""
    while True:
        page = http.get(f"{maps}?labelSelector=of%3Dtest&limit=2&continue={token}")
        assert len(page["items"]) <= 2
        names += [each["metadata"]["name"] for each in page["items"]]
        versions.add(page["metadata"]["resourceVersion"])
        token = urllib.parse.quote(page["metadata"].get("continue", ""))
        if not token:
            break
    assert names == list("abcde")
    assert len(versions) == 1
    refused(http("GET", f"{maps}?limit=1&continue=nonsense"), 400, "BadRequest")


def test_a_list_of_the_future_times_out(http, maps):
    refused(http("GET", f"{maps}?resourceVersion=99999999"), 504, "Timeout")
    refused(http("GET", f"{maps}?resourceVersion=text"), 400, "BadRequest")


# Update


def test_update_replaces_the_object(http, maps):
    created = http.create(maps, config_map())
    metadata = {**created["metadata"], "labels": {"a": "b"}}
    answer = http("PUT", f"{maps}/one", {**created, "metadata": metadata, "data": {"new": "1"}})
    assert answer.status == 200
    updated = http.get(f"{maps}/one")
    assert updated["data"] == {"new": "1"}
    assert updated["metadata"]["labels"] == {"a": "b"}
    assert updated["metadata"]["uid"] == created["metadata"]["uid"]
    assert updated["metadata"]["creationTimestamp"] == created["metadata"]["creationTimestamp"]
    assert updated["metadata"]["resourceVersion"] != created["metadata"]["resourceVersion"]


def test_a_stale_update_conflicts(http, maps):
    created = http.create(maps, config_map())
    http.merge(f"{maps}/one", {"data": {"key": "newer"}})
    body = refused(http("PUT", f"{maps}/one", created), 409, "Conflict")
    assert "the object has been modified" in body["message"]


def test_an_update_without_a_version_is_unconditional_for_built_in_kinds(http, maps):
    http.create(maps, config_map())
    assert http("PUT", f"{maps}/one", config_map(data={"a": "b"})).body["data"] == {"a": "b"}


@pytest.mark.parametrize(
    ("name", "metadata", "code", "reason"),
    [
        ("one", {"name": "other"}, 400, "BadRequest"),
        ("one", {"name": "one", "namespace": "other"}, 400, "BadRequest"),
        ("one", {"name": "one", "uid": "another"}, 409, "Conflict"),
        ("none", {"name": "none"}, 404, "NotFound"),
    ],
)
def test_update_refuses_another_object(http, maps, name, metadata, code, reason):
    http.create(maps, config_map())
    refused(http("PUT", f"{maps}/{name}", {"metadata": metadata}), code, reason)


def test_a_write_without_change_makes_no_version(http, maps):
    created = http.create(maps, config_map())
    patched = http.merge(f"{maps}/one", {"data": {"key": "value"}})
    assert patched["metadata"]["resourceVersion"] == created["metadata"]["resourceVersion"]


def test_methods_that_make_no_sense_are_refused(http, maps):
    http.create(maps, config_map())
    refused(http("PUT", maps, config_map()), 405, "MethodNotAllowed")
    refused(http("POST", f"{maps}/one", config_map()), 405, "MethodNotAllowed")


# Patch


def test_merge_patch_merges_and_removes(http, maps):
    http.create(maps, {"metadata": {"name": "one"}, "data": {"a": "1", "b": "2"}})
    patched = http.merge(f"{maps}/one", {"data": {"a": None, "c": "3"}})
    assert patched["data"] == {"b": "2", "c": "3"}


def test_a_stale_patch_conflicts(http, maps):
    http.create(maps, config_map())
    patch = {"metadata": {"resourceVersion": "1"}, "data": {"key": "x"}}
    refused(http("PATCH", f"{maps}/one", patch, content_type=MERGE_PATCH), 409, "Conflict")


def test_json_patch_applies_operations_in_order(http, maps):
    http.create(maps, config_map())
    operations = [
        {"op": "test", "path": "/data/key", "value": "value"},
        {"op": "add", "path": "/data/more", "value": "1"},
        {"op": "remove", "path": "/data/key"},
        {"op": "add", "path": "/metadata/labels", "value": {"a/b": "c"}},
        {"op": "replace", "path": "/metadata/labels/a~1b", "value": "d"},
    ]
    answer = http("PATCH", f"{maps}/one", operations, content_type=JSON_PATCH)
    assert answer.body["data"] == {"more": "1"}
    assert answer.body["metadata"]["labels"] == {"a/b": "d"}


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "test", "path": "/data/key", "value": "other"},
        {"op": "test", "path": "/metadata/resourceVersion", "value": "1"},
        {"op": "remove", "path": "/data/none"},
    ],
)
def test_a_json_patch_that_fails_changes_nothing(http, maps, operation):
    http.create(maps, config_map())
    operations = [{"op": "add", "path": "/data/a", "value": "b"}, operation]
    refused(http("PATCH", f"{maps}/one", operations, content_type=JSON_PATCH), 422, "Invalid")
    assert http.get(f"{maps}/one")["data"] == {"key": "value"}


@pytest.mark.parametrize(
    ("content_type", "patch", "code", "reason"),
    [
        (MERGE_PATCH, [], 400, "BadRequest"),
        (JSON_PATCH, {}, 400, "BadRequest"),
        ("application/json", {}, 415, "UnsupportedMediaType"),
        (MERGE_PATCH, {"metadata": {"name": "other"}}, 400, "BadRequest"),
        (MERGE_PATCH, {"metadata": {"uid": "other"}}, 422, "Invalid"),
    ],
)
def test_malformed_patches_are_refused(http, maps, content_type, patch, code, reason):
    http.create(maps, config_map())
    refused(http("PATCH", f"{maps}/one", patch, content_type=content_type), code, reason)


def test_a_patch_of_a_missing_object_is_not_found(http, maps):
    refused(http("PATCH", f"{maps}/none", {}, content_type=MERGE_PATCH), 404, "NotFound")


def pod(name, **spec):
    containers = [{"name": "main", "image": "some", "env": [{"name": "A", "value": "1"}]}]
    return {"metadata": {"name": name}, "spec": {"containers": containers, **spec}}


def test_strategic_merge_merges_lists_by_key(http, namespace):
    pods = f"/api/v1/namespaces/{namespace}/pods"
    http.create(pods, pod("p", containers=[{"name": n, "image": "some"} for n in "ab"]))
    patch = {"spec": {"containers": [{"name": "b", "image": "other"}]}}
    answer = http("PATCH", f"{pods}/p", patch, content_type=STRATEGIC_PATCH)
    assert answer.status == 200, answer
    images = {each["name"]: each["image"] for each in answer.body["spec"]["containers"]}
    assert images == {"a": "some", "b": "other"}


def test_strategic_merge_of_conditions_keeps_the_others(http, namespace):
    pods = f"/api/v1/namespaces/{namespace}/pods"
    http.create(pods, pod("p"))
    for kind in ("Ready", "PodScheduled"):
        patch = {"status": {"conditions": [{"type": kind, "status": "True"}]}}
        assert http("PATCH", f"{pods}/p/status", patch, content_type=STRATEGIC_PATCH).status == 200
    conditions = http.get(f"{pods}/p")["status"]["conditions"]
    assert {each["type"] for each in conditions} == {"Ready", "PodScheduled"}


def test_strategic_merge_obeys_its_directives(http, namespace):
    accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    http.create(
        accounts,
        {"metadata": {"name": "a"}, "secrets": [{"name": n} for n in "xyz"]},
    )
    patch = {
        "secrets": [{"name": "y", "$patch": "delete"}, {"name": "new"}],
        "$setElementOrder/secrets": [{"name": n} for n in ("new", "z", "x")],
    }
    answer = http("PATCH", f"{accounts}/a", patch, content_type=STRATEGIC_PATCH)
    assert [each["name"] for each in answer.body["secrets"]] == ["new", "z", "x"]


def test_apply_creates_and_then_merges(http, maps):
    def apply(data):
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}, "data": data}
        path = f"{maps}/one?fieldManager=tester"
        return http("PATCH", path, json.dumps(body).encode(), content_type=APPLY_PATCH)

    assert apply({"a": "1"}).status == 201
    answer = apply({"a": "2"})
    assert (answer.status, answer.body["data"]) == (200, {"a": "2"})


def test_apply_needs_a_field_manager_and_a_name(http, maps):
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}}
    refused(http("PATCH", f"{maps}/one", body, content_type=APPLY_PATCH), 422, "Invalid")
    nameless = {"apiVersion": "v1", "kind": "ConfigMap"}
    path = f"{maps}/one?fieldManager=tester"
    refused(http("PATCH", path, nameless, content_type=APPLY_PATCH), 400, "BadRequest")


# Status of pods


def test_a_new_pod_is_pending_with_defaults(http, namespace):
    path = f"/api/v1/namespaces/{namespace}/pods"
    created = http.create(path, {**pod("p"), "status": {"phase": "Running"}})
    assert created["status"]["phase"] == "Pending"
    spec = created["spec"]
    assert (spec["restartPolicy"], spec["terminationGracePeriodSeconds"]) == ("Always", 30)
    assert spec["serviceAccountName"] == "default"
    assert spec["containers"][0]["terminationMessagePath"] == "/dev/termination-log"
    refused(http("POST", path, {"metadata": {"name": "q"}, "spec": {}}), 422, "Invalid")


def test_pod_status_changes_only_by_its_subresource(http, namespace):
    path = f"/api/v1/namespaces/{namespace}/pods"
    http.create(path, pod("p"))
    http.merge(f"{path}/p", {"status": {"phase": "Running"}})
    assert http.get(f"{path}/p")["status"]["phase"] == "Pending"
    patch = {"status": {"phase": "Running"}, "spec": {"hostname": "x"}}
    http.merge(f"{path}/p/status", {**patch, "metadata": {"annotations": {"a": "b"}}})
    found = http.get(f"{path}/p")
    assert found["status"]["phase"] == "Running"
    assert "hostname" not in found["spec"]
    assert found["metadata"]["annotations"] == {"a": "b"}


def test_binding_gives_a_pod_to_a_node_once(http, namespace):
    path = f"/api/v1/namespaces/{namespace}/pods"
    http.create(path, pod("p"))
    binding = {"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "node-1"}}
    assert http("POST", f"{path}/p/binding", binding).status == 201
    assert http.get(f"{path}/p")["spec"]["nodeName"] == "node-1"
    refused(http("POST", f"{path}/p/binding", binding), 409, "Conflict")


# Leases and events


def test_a_lease_is_won_by_compare_and_swap(http, namespace):
    path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
    lease = http.create(path, {"metadata": {"name": "l"}, "spec": {"holderIdentity": "a"}})
    taken = {**lease, "spec": {"holderIdentity": "b"}}
    assert http("PUT", f"{path}/l", taken).status == 200
    refused(http("PUT", f"{path}/l", taken), 409, "Conflict")


def test_events_show_in_both_groups(http, namespace):
    core = f"/api/v1/namespaces/{namespace}/events"
    involved = {"kind": "Pod", "name": "p", "namespace": namespace, "uid": "u-1"}
    http.create(
        core,
        {
            "metadata": {"generateName": "event-"},
            "involvedObject": involved,
            "reason": "Tested",
            "message": "a message",
            "type": "Normal",
            "source": {"component": "tester"},
            "reportingComponent": "tester",
            "reportingInstance": "tester-1",
            "action": "Test",
            "eventTime": "2026-01-01T00:00:00.000000+00:00",
        },
    )
    for query in ("involvedObject.name=p,involvedObject.uid=u-1", "reason=Tested", "type=Normal"):
        assert len(http.get(f"{core}?fieldSelector={urllib.parse.quote(query)}")["items"]) == 1
    assert http.get(f"{core}?fieldSelector=involvedObject.name%3Dother")["items"] == []
    [event] = http.get(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events")["items"]
    assert (event["note"], event["regarding"]["name"]) == ("a message", "p")
    assert event["reportingController"] == "tester"


# Tables


def test_a_list_can_be_a_table(http, maps):
    http.create(maps, config_map())
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
    table = http("GET", maps, accept=accept).body
    assert (table["kind"], table["apiVersion"]) == ("Table", "meta.k8s.io/v1")
    assert table["columnDefinitions"][0]["name"] == "Name"
    assert "Age" in [each["name"] for each in table["columnDefinitions"]]
    row = next(each for each in table["rows"] if each["cells"][0] == "one")
    assert row["object"]["kind"] == "PartialObjectMetadata"
    assert row["object"]["metadata"]["name"] == "one"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("pods", ["Name", "Ready", "Status", "Restarts", "Age"]),
        ("events", ["Last Seen", "Type", "Reason", "Object", "Message"]),
    ],
)
def test_tables_have_the_usual_columns(http, namespace, path, names):
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io"
    table = http("GET", f"/api/v1/namespaces/{namespace}/{path}", accept=accept).body
    shown = [each["name"] for each in table["columnDefinitions"] if each["priority"] == 0]
    assert shown == names


def test_an_unknown_form_is_not_acceptable(http, maps):
    assert http("GET", maps, accept="image/png").status == 406
