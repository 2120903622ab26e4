//! Rules for the pod of a node: rights, time to save, shared memory, GPUs, image, variables.

use serde_json::Value;

use super::{Faults, number, whole};

/// The resource by which NVIDIA's plugin counts its cards.
pub const GPU: &str = "nvidia.com/gpu";
/// The shortest time between SIGTERM and SIGKILL, in seconds.
const LEAST_GRACE: i64 = 60;

/// Checks the `spec` of a pod.
pub fn check(pod: &Value, is_filled_in: bool, faults: &mut Faults) {
    let policy = &pod["restartPolicy"];
    faults.expect(
        policy == "Never",
        format!("`restartPolicy` should be Never: a rule for exit codes sees no other pods, got: {policy}"),
    );
    let grace = &pod["terminationGracePeriodSeconds"];
    faults.expect(
        grace.as_i64().is_some_and(|seconds| seconds >= LEAST_GRACE),
        format!(
            "`terminationGracePeriodSeconds` should be at least {LEAST_GRACE}, longer than a save, got: {grace}"
        ),
    );
    whole(&pod["activeDeadlineSeconds"], "activeDeadlineSeconds", 1, faults);
    let Some(container) = pod["containers"].as_array().and_then(|all| all.first()) else { return };
    image(container["image"].as_str().unwrap_or_default(), faults);
    if !is_filled_in {
        arguments(&container["args"], faults);
        resources(&container["resources"], faults);
    }
    for variable in variables(container) {
        self::variable(variable, faults);
    }
    rights(pod, container, faults);
    volumes(pod, container, faults);
}

/// Variables of a container.
pub fn variables(container: &Value) -> impl Iterator<Item = &Value> {
    container["env"].as_array().into_iter().flatten()
}

/// The value of one of them, where it is written down.
pub fn value_of<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    variables(container).find(|variable| variable["name"] == name)?["value"].as_str()
}

/// An image that stays the same.
pub fn image(image: &str, faults: &mut Faults) {
    let name = image.rsplit('/').next().unwrap_or_default();
    let is_fixed =
        name.contains('@') || name.split_once(':').is_some_and(|(_, tag)| tag != "latest");
    faults.expect(
        is_fixed,
        format!("`image` should have a tag other than latest, or a digest: nodes of different builds do not run together, got: {image}"),
    );
}

/// What lorarun is told to do.
pub fn arguments(arguments: &Value, faults: &mut Faults) {
    let words: Vec<&str> =
        arguments.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    faults.expect(
        words.contains(&"train"),
        format!("`args` should be those of `train`, got: {arguments}"),
    );
    let resumes = words.windows(2).any(|pair| pair[0] == "--resume")
        || words.iter().any(|word| word.starts_with("--resume="));
    faults.expect(
        resumes,
        "`args` should have `--resume auto`: a pod that is replaced would begin anew",
    );
}

/// One variable.
pub fn variable(variable: &Value, faults: &mut Faults) {
    let name = variable["name"].as_str().unwrap_or_default();
    match name {
        "JOB_COMPLETION_INDEX" => {
            let source = &variable["valueFrom"]["fieldRef"]["fieldPath"];
            let wanted = "metadata.annotations['batch.kubernetes.io/job-completion-index']";
            faults.expect(
                source == wanted,
                "`JOB_COMPLETION_INDEX` is set by Kubernetes: written down, all pods are one node",
            );
        }
        "LORARUN_TOKEN" => faults.expect(
            variable["valueFrom"]["secretKeyRef"]["name"].is_string(),
            "`LORARUN_TOKEN` should come from a secret: who can read the manifest could take part",
        ),
        "MASTER_PORT" => {
            let port = number(&variable["value"]);
            faults.expect(
                port.is_some_and(|port| (1..=65535).contains(&port)),
                format!("`MASTER_PORT` should be 1 to 65535, got: {}", variable["value"]),
            );
        }
        "RANK" | "WORLD_SIZE" | "LOCAL_RANK" | "LOCAL_WORLD_SIZE" => {
            faults.say(format!("`{name}` is set by the launcher for each process, not for a pod"));
        }
        name if name.starts_with("PET_") => {
            faults.say(format!(
                "`{name}` is set by Kubeflow, and stands for another way to say where a node is"
            ));
        }
        _ => {}
    }
    let value = &variable["value"];
    faults.expect(
        value.is_null() || value.is_string(),
        format!("the value of `{name}` should be a text, in quotation marks, got: {value}"),
    );
}

/// Amounts above zero; as many GPUs asked for as allowed.
pub fn resources(resources: &Value, faults: &mut Faults) {
    for group in ["requests", "limits"] {
        for (name, amount) in resources[group].as_object().into_iter().flatten() {
            let text = amount.as_str().map_or_else(|| amount.to_string(), str::to_owned);
            let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
            faults.expect(
                digits.parse::<f64>().is_ok_and(|number| number > 0.0),
                format!("`resources.{group}` of {name} should be above 0, got: {text}"),
            );
        }
    }
    let (asked, most) = (&resources["requests"][GPU], &resources["limits"][GPU]);
    faults.expect(
        asked.is_null() || number(asked) == number(most),
        format!("GPUs in `requests` and `limits` should be equal, got: {asked} and {most}"),
    );
    faults.expect(
        !resources["limits"]["memory"].is_null(),
        "`resources.limits` of memory is missing: a leak would take the node with it",
    );
}

fn rights(pod: &Value, container: &Value, faults: &mut Faults) {
    let (of_pod, own) = (&pod["securityContext"], &container["securityContext"]);
    let is_not_root = own["runAsNonRoot"] == true
        || (own["runAsNonRoot"].is_null() && of_pod["runAsNonRoot"] == true);
    faults.expect(is_not_root, "`securityContext.runAsNonRoot` should be true");
    faults.expect(
        own["allowPrivilegeEscalation"] == false && own["privileged"] != true,
        "`securityContext.allowPrivilegeEscalation` should be false, `privileged` not true",
    );
    for shared in ["hostNetwork", "hostPID", "hostIPC"] {
        faults.expect(pod[shared] != true, format!("`{shared}` is not needed"));
    }
    let has_tmp =
        mounts(container).any(|mount| mount["mountPath"] == "/tmp" && mount["readOnly"] != true);
    faults.expect(
        own["readOnlyRootFilesystem"] != true || has_tmp,
        "with `readOnlyRootFilesystem` a volume at /tmp is needed, for kernels that are compiled",
    );
}

fn mounts(container: &Value) -> impl Iterator<Item = &Value> {
    container["volumeMounts"].as_array().into_iter().flatten()
}

fn volumes(pod: &Value, container: &Value, faults: &mut Faults) {
    let all = pod["volumes"].as_array().cloned().unwrap_or_default();
    let named = |name: &Value| all.iter().find(|volume| volume["name"] == *name);
    for mount in mounts(container) {
        faults.expect(
            named(&mount["name"]).is_some(),
            format!("`volumeMounts` names no volume of the pod: {}", mount["name"]),
        );
    }
    let claims = mounts(container).filter(|mount| {
        named(&mount["name"]).is_some_and(|volume| {
            ["persistentVolumeClaim", "nfs", "hostPath", "csi", "ephemeral"]
                .iter()
                .any(|kind| volume.get(*kind).is_some())
        })
    });
    let writable = claims.filter(|mount| mount["readOnly"] != true).count();
    faults.expect(
        writable > 0,
        "no volume outlives the pod: states and the LoRA would be lost with it",
    );
    let shm = mounts(container).find(|mount| mount["mountPath"] == "/dev/shm");
    let shm = shm.and_then(|mount| named(&mount["name"])).map(|volume| &volume["emptyDir"]);
    let is_memory = shm.is_some_and(|empty| empty["medium"] == "Memory");
    faults.expect(
        is_memory,
        "a volume at /dev/shm of `emptyDir` with `medium: Memory` is missing: NCCL needs more than 64 MiB",
    );
    faults.expect(
        !is_memory || shm.is_some_and(|empty| empty["sizeLimit"].is_string()),
        "the volume at /dev/shm should have a `sizeLimit`: it counts as the pod's memory",
    );
}
