//! Misspelt names of fields. Kubernetes' own kinds have a schema; a JobSet and what is Kubeflow's are
//! read by their operators, which leave out what they do not know.

use serde_json::Value;
use trainer::options::closest;

use super::Faults;

/// A level and the names it may have.
type Level = (&'static str, &'static [&'static str]);

const GROUP: &[&str] = &["name", "groupName", "replicas", "template", "dependsOn"];
const JOBSET: &[Level] = &[
    ("", &["apiVersion", "kind", "metadata", "spec"]),
    (
        "/spec",
        &[
            "replicatedJobs",
            "network",
            "successPolicy",
            "failurePolicy",
            "startupPolicy",
            "suspend",
            "coordinator",
            "managedBy",
            "ttlSecondsAfterFinished",
            "volumeClaimPolicies",
        ],
    ),
    ("/spec/network", &["enableDNSHostnames", "subdomain", "publishNotReadyAddresses"]),
    ("/spec/failurePolicy", &["maxRestarts", "restartStrategy", "rules"]),
    ("/spec/replicatedJobs/0", GROUP),
    ("/spec/replicatedJobs/0/template", &["metadata", "spec"]),
];
const RUNTIME: &[Level] = &[
    ("", &["apiVersion", "kind", "metadata", "spec"]),
    ("/spec", &["mlPolicy", "podGroupPolicy", "template"]),
    ("/spec/mlPolicy", &["numNodes", "torch", "mpi", "jax", "flux", "xgboost"]),
    ("/spec/mlPolicy/torch", &["numProcPerNode", "elasticPolicy"]),
    ("/spec/template", &["metadata", "spec"]),
    ("/spec/template/spec/replicatedJobs/0", GROUP),
    ("/spec/template/spec/replicatedJobs/0/template", &["metadata", "spec"]),
];
const TRAINJOB: &[Level] = &[
    ("", &["apiVersion", "kind", "metadata", "spec"]),
    (
        "/spec",
        &[
            "runtimeRef",
            "initializer",
            "trainer",
            "labels",
            "annotations",
            "podTemplateOverrides",
            "podSpecOverrides",
            "runtimePatches",
            "activeDeadlineSeconds",
            "suspend",
            "managedBy",
        ],
    ),
    ("/spec/runtimeRef", &["apiGroup", "kind", "name"]),
    (
        "/spec/trainer",
        &["image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"],
    ),
    ("/spec/trainer/resourcesPerNode", &["requests", "limits", "claims"]),
];
/// The Job of a JobSet is Kubernetes' own, but nobody has looked at it before its operator makes it.
const JOB: &[&str] = &[
    "activeDeadlineSeconds",
    "backoffLimit",
    "backoffLimitPerIndex",
    "completionMode",
    "completions",
    "managedBy",
    "manualSelector",
    "maxFailedIndexes",
    "parallelism",
    "podFailurePolicy",
    "podReplacementPolicy",
    "selector",
    "successPolicy",
    "suspend",
    "template",
    "ttlSecondsAfterFinished",
];

/// Says every name that is none.
pub fn check(kind: &str, body: &Value, faults: &mut Faults) {
    let (levels, job) = match kind {
        "JobSet" => (JOBSET, "/spec/replicatedJobs/0/template/spec"),
        "TrainingRuntime" | "ClusterTrainingRuntime" => {
            (RUNTIME, "/spec/template/spec/replicatedJobs/0/template/spec")
        }
        "TrainJob" => (TRAINJOB, "/none"),
        "Job" => (&[][..], "/spec"),
        _ => return,
    };
    for (place, names) in levels.iter().copied().chain([(job, JOB)]) {
        let Some(Value::Object(fields)) = body.pointer(place) else { continue };
        for name in fields.keys().filter(|name| !names.contains(&name.as_str())) {
            let near = closest(name, names).map(|near| format!(", did you mean `{near}`?"));
            let place = place.trim_start_matches('/').replace('/', ".");
            faults.say(format!("unknown field in `{place}`: `{name}`{}", near.unwrap_or_default()));
        }
    }
}
