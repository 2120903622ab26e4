//! Rules for a Job: pods with numbers, as many as the run has nodes, and what their exit codes mean.

use serde_json::Value;

use super::{Document, Faults, list, number, pod, whole};

/// Where a Job stands: what the names of its pods come from.
pub struct Place<'a> {
    /// Name of node 0 in the network, where it is known; its Service is the part after the dot.
    pub first: Option<String>,
    /// The Service that a Job by itself needs.
    service: Option<Option<&'a Value>>,
    /// Kubeflow fills in number of nodes, command, image and addresses.
    pub is_filled_in: bool,
    /// The Job's own name.
    name: Option<&'a str>,
}

impl<'a> Place<'a> {
    /// A Job by itself: the Service is in the same file.
    pub fn of_job(name: &'a str, documents: &'a [Document]) -> Place<'a> {
        let service = documents.iter().find(|other| other.kind == "Service");
        let first = service.map(|service| format!("{name}-0.{}", service.name));
        let service = Some(service.map(|service| &service.body["spec"]));
        Place { first, service, is_filled_in: false, name: Some(name) }
    }

    /// A Job of a JobSet, which makes the Service.
    pub fn within(first: String) -> Place<'a> {
        Place { first: Some(first), service: None, is_filled_in: false, name: None }
    }

    /// The Job of a runtime of Kubeflow.
    pub fn of_runtime() -> Place<'a> {
        Place { first: None, service: None, is_filled_in: true, name: None }
    }
}

/// Checks a Job's `spec`.
pub fn check(spec: &Value, place: &Place<'_>, faults: &mut Faults) {
    let nodes = match place.is_filled_in {
        true => None,
        false => Some(count(spec, faults)),
    };
    let backoff = &spec["backoffLimit"];
    faults.expect(
        backoff.as_i64().is_some_and(|limit| limit > 0),
        format!(
            "`backoffLimit` should be above 0: one lost pod must not end the run, got: {backoff}"
        ),
    );
    faults.expect(
        spec["backoffLimitPerIndex"].is_null(),
        "`backoffLimitPerIndex` gives up one node, and the others cannot finish without it: use `backoffLimit`",
    );
    let replacement = &spec["podReplacementPolicy"];
    faults.expect(
        replacement.is_null() || replacement == "Failed",
        format!("`podReplacementPolicy` should be Failed: never two pods of one number, got: {replacement}"),
    );
    whole(&spec["activeDeadlineSeconds"], "activeDeadlineSeconds", 1, faults);
    whole(&spec["ttlSecondsAfterFinished"], "ttlSecondsAfterFinished", 0, faults);
    let pod = &spec["template"]["spec"];
    let Some(container) = pod["containers"].as_array().and_then(|all| all.first()) else {
        faults.say("the pod has no container");
        return;
    };
    policy(&spec["podFailurePolicy"], container["name"].as_str().unwrap_or_default(), faults);
    pod::check(pod, place.is_filled_in, faults);
    if let Some(nodes) = nodes.filter(|nodes| *nodes > 1) {
        network(pod, container, nodes, place, faults);
    }
    if let Some(Some(service)) = place.service {
        serves(service, place, spec, container, faults);
    }
}

/// Number of nodes.
fn count(spec: &Value, faults: &mut Faults) -> i64 {
    let mode = &spec["completionMode"];
    faults.expect(
        mode == "Indexed",
        format!("`completionMode` should be Indexed, so that pods have numbers, got: {mode}"),
    );
    let (completions, parallelism) = (&spec["completions"], &spec["parallelism"]);
    let is_same = completions == parallelism && completions.as_i64().is_some_and(|count| count > 0);
    faults.expect(
        is_same,
        format!(
            "`completions` and `parallelism` should both be the number of nodes, got: {completions} and {parallelism}"
        ),
    );
    completions.as_i64().unwrap_or(1)
}

/// What the exit codes of lorarun should lead to.
fn policy(policy: &Value, container: &str, faults: &mut Faults) {
    if policy.is_null() {
        faults.say(
            "`podFailurePolicy` is missing: 64 and 78 should fail the job, 75 should not count",
        );
        return;
    }
    let rules = list(&policy["rules"], "podFailurePolicy.rules", faults);
    for rule in rules {
        let action = rule["action"].as_str().unwrap_or_default();
        faults.expect(
            ["FailJob", "Ignore", "Count", "FailIndex"].contains(&action),
            format!("an action should be FailJob, Ignore or Count, got: {action}"),
        );
        let codes = &rule["onExitCodes"];
        let named = codes["containerName"].as_str();
        faults.expect(
            named.is_none_or(|named| named == container),
            format!("`containerName` should be {container}, got: {}", named.unwrap_or_default()),
        );
        let has_zero = codes["values"].as_array().is_some_and(|all| all.iter().any(|v| *v == 0));
        faults.expect(!(codes["operator"] == "In" && has_zero), "code 0 is no failure");
    }
    for (code, wanted, why) in [
        (64, "FailJob", "wrong usage stays wrong"),
        (78, "FailJob", "a wrong configuration stays wrong"),
        (75, "Ignore", "the run was saved and goes on"),
    ] {
        let action = rules.iter().find(|rule| takes(rule, code)).map(|rule| &rule["action"]);
        faults.expect(
            action.is_some_and(|action| action == wanted),
            format!(
                "the first rule for exit code {code} should be {wanted}, {why}, got: {}",
                action.unwrap_or(&Value::Null)
            ),
        );
    }
    let disrupted = |condition: &Value| condition["type"] == "DisruptionTarget";
    let rule = rules.iter().find(|rule| {
        rule["onPodConditions"].as_array().is_some_and(|all| all.iter().any(disrupted))
    });
    faults.expect(
        rule.is_some_and(|rule| rule["action"] == "Ignore"),
        "a rule for the condition DisruptionTarget should be Ignore: preemption is no failure",
    );
}

/// Whether a rule is about this exit code.
fn takes(rule: &Value, code: i64) -> bool {
    let codes = &rule["onExitCodes"];
    let Some(values) = codes["values"].as_array() else { return false };
    let is_in = values.iter().any(|value| value.as_i64() == Some(code));
    match codes["operator"].as_str() {
        Some("In") => is_in,
        Some("NotIn") => !is_in,
        _ => false,
    }
}

/// How the nodes find each other.
fn network(pod: &Value, container: &Value, nodes: i64, place: &Place<'_>, faults: &mut Faults) {
    if place.service == Some(None) {
        faults.say("a headless Service is missing: several nodes find each other by its names");
    }
    let said = pod::value_of(container, "LORARUN_NODES");
    let most =
        said.and_then(|said| crate::site::parse_nodes(said).ok()).map(|(_, most)| most as i64);
    faults.expect(
        most == Some(nodes),
        format!(
            "`LORARUN_NODES` should be {nodes}, as many as there are pods, got: {}",
            said.unwrap_or("nothing")
        ),
    );
    let address = pod::value_of(container, "MASTER_ADDR").unwrap_or("nothing");
    if let Some(first) = &place.first {
        let is_first = address == first
            || address.strip_prefix(first.as_str()).is_some_and(|rest| rest.starts_with('.'));
        faults.expect(is_first, format!("`MASTER_ADDR` should be {first}, got: {address}"));
        let service = first.split_once('.').map_or("", |(_, service)| service);
        let subdomain = pod["subdomain"].as_str();
        // A JobSet sets it by itself.
        faults.expect(
            subdomain == Some(service) || (place.service.is_none() && subdomain.is_none()),
            format!(
                "`subdomain` should be the name of the Service, {service}, got: {}",
                subdomain.unwrap_or("nothing")
            ),
        );
    }
    let sealed = pod::variables(container).any(|variable| variable["name"] == "LORARUN_TOKEN");
    faults.expect(
        sealed,
        "`LORARUN_TOKEN` is missing: whoever reaches the port could take part in the run",
    );
    let port = pod::value_of(container, "MASTER_PORT").and_then(|port| port.parse().ok());
    let port: i64 = port.unwrap_or(i64::from(crate::site::DEFAULT_PORT));
    let ports = container["ports"].as_array().cloned().unwrap_or_default();
    faults.expect(
        ports.is_empty() || ports.iter().any(|have| number(&have["containerPort"]) == Some(port)),
        format!("`ports` of the container do not have that of MASTER_PORT, {port}"),
    );
}

/// Whether the Service is that of this Job.
fn serves(
    service: &Value,
    place: &Place<'_>,
    spec: &Value,
    container: &Value,
    faults: &mut Faults,
) {
    let labels = &spec["template"]["metadata"]["labels"];
    let own = |key: &str| match key {
        "batch.kubernetes.io/job-name" | "job-name" => place.name,
        key => labels[key].as_str(),
    };
    let selector = service["selector"].as_object();
    let is_own = selector.is_some_and(|selector| {
        !selector.is_empty() && selector.iter().all(|(key, value)| own(key) == value.as_str())
    });
    faults.expect(
        is_own,
        format!("the Service selects other pods than this job's, got: {}", service["selector"]),
    );
    let port = pod::value_of(container, "MASTER_PORT").and_then(|port| port.parse().ok());
    let port: i64 = port.unwrap_or(i64::from(crate::site::DEFAULT_PORT));
    let ports = service["ports"].as_array().cloned().unwrap_or_default();
    faults.expect(
        ports.is_empty() || ports.iter().any(|have| number(&have["port"]) == Some(port)),
        format!("`ports` of the Service do not have that of MASTER_PORT, {port}"),
    );
}
