//! What is wrong with manifests: rules for what a schema lets through, and for what only lorarun needs.
//!
//! - this file: documents and their kinds; Service, JobSet, TrainJob
//! - `job`: a Job, alone or within a JobSet or runtime; its policy for exit codes
//! - `pod`: what the pod of a node needs
//! - `fields`: misspelt names, for kinds that no schema of Kubernetes itself knows

mod fields;
mod job;
mod pod;

use anyhow::{Result, bail};
use serde_json::Value;

/// One document with its name for messages.
pub struct Document {
    kind: String,
    name: String,
    body: Value,
}

/// Faults, each with the place.
#[derive(Default)]
pub struct Faults {
    place: String,
    said: Vec<String>,
}

impl Faults {
    /// Says one.
    pub fn say(&mut self, what: impl AsRef<str>) {
        self.said.push(format!("{}: {}", self.place, what.as_ref()));
    }

    /// Says one unless it is as it should be.
    pub fn expect(&mut self, is_right: bool, what: impl AsRef<str>) {
        if !is_right {
            self.say(what);
        }
    }
}

/// The faults of a file of manifests.
///
/// # Errors
/// No YAML, or nothing that runs.
pub fn faults_of(text: &str) -> Result<Vec<String>> {
    let documents = documents(text)?;
    let runs = ["Job", "JobSet", "TrainJob", "TrainingRuntime", "ClusterTrainingRuntime"];
    if !documents.iter().any(|document| runs.contains(&document.kind.as_str())) {
        bail!("no document is a Job, JobSet or TrainJob");
    }
    let mut faults = Faults::default();
    for document in &documents {
        faults.place = format!("{} {}", document.kind, document.name);
        let Document { kind, name, body } = document;
        let is_name = super::options::label(name).is_ok();
        faults.expect(is_name, format!("`metadata.name` cannot be a name, got: {name}"));
        fields::check(kind, body, &mut faults);
        match kind.as_str() {
            "Service" => service(body, &mut faults),
            "Job" => {
                let place = job::Place::of_job(name, &documents);
                job::check(&body["spec"], &place, &mut faults);
            }
            "JobSet" => jobset(document, &mut faults),
            "TrainingRuntime" | "ClusterTrainingRuntime" => runtime(document, &mut faults),
            "TrainJob" => trainjob(document, &documents, &mut faults),
            "Secret" => {
                faults.say("a secret does not belong in a file with the job: make it by `kubectl create secret`");
            }
            "PersistentVolumeClaim" | "ConfigMap" | "Namespace" | "ServiceAccount" => {}
            _ => faults.say("of this kind nothing is known here"),
        }
    }
    Ok(faults.said)
}

fn documents(text: &str) -> Result<Vec<Document>> {
    let bodies: Vec<Value> = match serde_saphyr::from_multiple(text) {
        Ok(bodies) => bodies,
        Err(error) => bail!("this is no YAML: {error}"),
    };
    let mut documents = Vec::new();
    for body in bodies.into_iter().filter(|body| !body.is_null()) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (kind, name) = (text(&body["kind"]), text(&body["metadata"]["name"]));
        let (group, known) = (text(&body["apiVersion"]), version_of(&kind));
        if kind.is_empty() {
            bail!("a document has no `kind`");
        }
        if known.is_some_and(|known| known != group) {
            bail!(
                "{kind} {name}: `apiVersion` should be {}, got: {group}",
                known.unwrap_or_default()
            );
        }
        documents.push(Document { kind, name, body });
    }
    Ok(documents)
}

fn version_of(kind: &str) -> Option<&'static str> {
    match kind {
        "Job" => Some("batch/v1"),
        "Service" => Some("v1"),
        "JobSet" => Some("jobset.x-k8s.io/v1alpha2"),
        "TrainJob" | "TrainingRuntime" | "ClusterTrainingRuntime" => {
            Some("trainer.kubeflow.org/v1alpha1")
        }
        _ => None,
    }
}

fn service(body: &Value, faults: &mut Faults) {
    let spec = &body["spec"];
    faults.expect(
        spec["clusterIP"] == "None",
        "`spec.clusterIP` should be None: pods get names by a headless Service alone",
    );
    faults.expect(
        spec["publishNotReadyAddresses"] == true,
        "`spec.publishNotReadyAddresses` should be true: nodes meet before any of them is ready",
    );
}

fn jobset(document: &Document, faults: &mut Faults) {
    let spec = &document.body["spec"];
    let network = &spec["network"];
    faults.expect(
        network["enableDNSHostnames"] != false && network["publishNotReadyAddresses"] != false,
        "`spec.network` should give pods names before they are ready",
    );
    whole(&spec["failurePolicy"]["maxRestarts"], "spec.failurePolicy.maxRestarts", 0, faults);
    whole(&spec["ttlSecondsAfterFinished"], "spec.ttlSecondsAfterFinished", 0, faults);
    let subdomain = network["subdomain"].as_str().unwrap_or(&document.name);
    for group in list(&spec["replicatedJobs"], "spec.replicatedJobs", faults) {
        let name = group["name"].as_str().unwrap_or_default();
        let replicas = group.get("replicas").unwrap_or(&Value::Null);
        faults.expect(
            replicas.is_null() || *replicas == 1,
            format!("`replicas` of {name} should be 1, the pods of one Job are the nodes, got: {replicas}"),
        );
        let first = format!("{}-{name}-0-0.{subdomain}", document.name);
        let place = job::Place::within(first);
        job::check(&group["template"]["spec"], &place, faults);
    }
}

fn runtime(document: &Document, faults: &mut Faults) {
    let spec = &document.body["spec"];
    whole(&spec["mlPolicy"]["numNodes"], "spec.mlPolicy.numNodes", 1, faults);
    faults.expect(
        spec["mlPolicy"]["torch"].is_object(),
        "`spec.mlPolicy.torch` is missing: without it nodes are not told of each other",
    );
    let groups = list(&spec["template"]["spec"]["replicatedJobs"], "replicatedJobs", faults);
    let Some(group) = groups.iter().find(|group| group["name"] == "node") else {
        faults.say("one of `replicatedJobs` should have the name `node`, which Kubeflow fills in");
        return;
    };
    let label = "trainer.kubeflow.org/trainjob-ancestor-step";
    faults.expect(
        group["template"]["metadata"]["labels"][label] == "trainer",
        format!("the label `{label}: trainer` is missing: Kubeflow would not find the job"),
    );
    job::check(&group["template"]["spec"], &job::Place::of_runtime(), faults);
}

fn trainjob(document: &Document, documents: &[Document], faults: &mut Faults) {
    let spec = &document.body["spec"];
    let wanted = (spec["runtimeRef"]["kind"].as_str(), spec["runtimeRef"]["name"].as_str());
    // The default of the kind.
    let (kind, name) = (wanted.0.unwrap_or("ClusterTrainingRuntime"), wanted.1.unwrap_or_default());
    let mut runtimes = documents.iter().filter(|other| other.kind.ends_with("TrainingRuntime"));
    if runtimes.clone().next().is_some() {
        faults.expect(
            runtimes.any(|other| other.kind == kind && other.name == name),
            format!(
                "`spec.runtimeRef` names none of the runtimes in this file, got: {kind} {name}"
            ),
        );
    }
    let trainer = &spec["trainer"];
    whole(&trainer["numNodes"], "spec.trainer.numNodes", 1, faults);
    let processes = &trainer["numProcPerNode"];
    faults.expect(
        processes.as_u64().is_some_and(|count| count > 0),
        format!("`spec.trainer.numProcPerNode` should be a number from 1, got: {processes}"),
    );
    let resources = &trainer["resourcesPerNode"];
    pod::resources(resources, faults);
    let gpus = &resources["limits"][pod::GPU];
    faults.expect(
        gpus.is_null() || number(gpus) == number(processes),
        format!("`numProcPerNode` and GPUs should be equal, got: {processes} and {gpus}"),
    );
    let lorarun = trainer["command"][0].as_str().is_none_or(|command| command.ends_with("lorarun"));
    faults.expect(lorarun, "`spec.trainer.command` should be lorarun");
    pod::arguments(&trainer["args"], faults);
    if let Some(image) = trainer["image"].as_str() {
        pod::image(image, faults);
    }
    for variable in trainer["env"].as_array().into_iter().flatten() {
        pod::variable(variable, faults);
    }
}

/// A whole number of at least this much, where there is one.
fn whole(value: &Value, name: &str, least: i64, faults: &mut Faults) {
    let is_right = value.is_null() || value.as_i64().is_some_and(|number| number >= least);
    faults.expect(is_right, format!("`{name}` should be a number from {least}, got: {value}"));
}

/// A number, written as such or as a text.
fn number(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

fn list<'a>(value: &'a Value, name: &str, faults: &mut Faults) -> &'a [Value] {
    match value.as_array() {
        Some(values) if !values.is_empty() => values,
        _ => {
            faults.say(format!("`{name}` should be a list, got: {value}"));
            &[]
        }
    }
}

#[cfg(test)]
mod tests;
