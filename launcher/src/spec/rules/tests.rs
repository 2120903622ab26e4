//! Every rule has a manifest that breaks it, and the manifests of `deploy/` break none.

use super::faults_of;

const INDEXED_JOB: &str = include_str!("../../../../deploy/kubernetes/indexed_job.yaml");
const JOBSET: &str = include_str!("../../../../deploy/kubernetes/jobset.yaml");
const TRAINJOB: &str = include_str!("../../../../deploy/kubernetes/kubeflow_trainjob.yaml");

#[test]
fn the_manifests_are_right() {
    for manifest in [INDEXED_JOB, JOBSET, TRAINJOB] {
        assert_eq!(faults_of(manifest).unwrap(), Vec::<String>::new());
    }
}

/// Each changed in one place, with words of the fault that this makes.
fn assert_caught(manifest: &str, changes: &[(&str, &str, &str)]) {
    for (from, to, said) in changes {
        assert!(manifest.contains(from), "nothing to change: {from}");
        let faults = faults_of(&manifest.replacen(from, to, 1)).unwrap();
        assert!(faults.iter().any(|fault| fault.contains(said)), "{from} -> {to}: {faults:?}");
    }
}

#[test]
fn a_job_that_is_wrong_is_caught() {
    assert_caught(
        INDEXED_JOB,
        &[
            ("completionMode: Indexed", "completionMode: indexd", "should be Indexed"),
            ("  completionMode: Indexed\n", "", "should be Indexed"),
            ("parallelism: 2", "parallelism: 1", "should both be the number of nodes"),
            ("completions: 2", "completions: -2", "should both be the number of nodes"),
            ("backoffLimit: 8", "backoffLimit: 0", "`backoffLimit` should be above 0"),
            ("backoffLimit: 8", "backoffLimit: 8\n  backoffLimitPerIndex: 2", "gives up one node"),
            (
                "podReplacementPolicy: Failed",
                "podReplacementPolicy: TerminatingOrFailed",
                "never two pods",
            ),
            ("ttlSecondsAfterFinished: 86400", "ttlSecondsAfterFinished: -1", "from 0, got: -1"),
            ("ttlSecondsAfterFinished: 86400", "activeDeadlineSeconds: -5", "from 1, got: -5"),
            ("backoffLimit: 8", "backoffLimit: 8\n  paralelism: 2", "did you mean `parallelism`?"),
            ("values: [64, 78]", "values: [64]", "exit code 78 should be FailJob"),
            ("values: [75]", "values: [76]", "exit code 75 should be Ignore"),
            ("values: [64, 78]", "values: [64, 75, 78]", "exit code 75 should be Ignore"),
            ("values: [75]", "values: [0, 75]", "code 0 is no failure"),
            ("action: FailJob", "action: Fail", "an action should be"),
            ("action: FailJob", "action: Count", "exit code 64 should be FailJob"),
            ("containerName: lorarun", "containerName: main", "`containerName` should be lorarun"),
            ("type: DisruptionTarget", "type: Disruption", "DisruptionTarget should be Ignore"),
            ("podFailurePolicy:", "podFailurePolice:", "`podFailurePolicy` is missing"),
        ],
    );
}

#[test]
fn a_pod_that_is_wrong_is_caught() {
    assert_caught(
        INDEXED_JOB,
        &[
            ("restartPolicy: Never", "restartPolicy: OnFailure", "`restartPolicy` should be Never"),
            ("GracePeriodSeconds: 180", "GracePeriodSeconds: 30", "longer than a save"),
            ("      terminationGracePeriodSeconds: 180\n", "", "longer than a save"),
            ("lorarun:0.1.0", "lorarun:latest", "a tag other than latest"),
            ("lorarun:0.1.0", "lorarun", "a tag other than latest"),
            ("\"--resume\", \"auto\"", "\"--seed\", \"1\"", "would begin anew"),
            ("[\"train\",", "[\"plan\",", "should be those of `train`"),
            ("runAsNonRoot: true", "runAsNonRoot: false", "`securityContext.runAsNonRoot`"),
            ("allowPrivilegeEscalation: false", "privileged: true", "should be false"),
            ("enableServiceLinks: false", "hostNetwork: true", "`hostNetwork` is not needed"),
            ("mountPath: /tmp", "mountPath: /scratch", "a volume at /tmp is needed"),
            ("mountPath: /dev/shm", "mountPath: /shm", "a volume at /dev/shm"),
            ("medium: Memory", "medium: \"\"", "a volume at /dev/shm"),
            ("            sizeLimit: 8Gi\n", "", "should have a `sizeLimit`"),
            ("            - name: shm", "            - name: share", "names no volume"),
            (
                "              mountPath: /data",
                "              mountPath: /data\n              readOnly: true",
                "outlives",
            ),
            ("memory: 128Gi", "memory: -1Gi", "should be above 0, got: -1Gi"),
            ("nvidia.com/gpu: 4", "nvidia.com/gpu: 3", "should be equal, got: 3 and 4"),
            (
                "            limits:\n              memory: 128Gi\n",
                "            limits:\n",
                "a leak",
            ),
            ("value: \"29500\"", "value: \"0\"", "`MASTER_PORT` should be 1 to 65535"),
            ("value: \"29500\"", "value: 29500", "in quotation marks, got: 29500"),
            ("name: HOME", "name: WORLD_SIZE", "is set by the launcher"),
            ("name: HOME", "name: PET_NNODES", "is set by Kubeflow"),
            ("name: HOME", "name: JOB_COMPLETION_INDEX", "all pods are one node"),
        ],
    );
    let token = "              valueFrom:\n                secretKeyRef:\n                  name: lorarun-token\n                  key: token";
    assert_caught(
        INDEXED_JOB,
        &[(token, "              value: open", "should come from a secret")],
    );
}

#[test]
fn nodes_that_cannot_meet_are_caught() {
    assert_caught(
        INDEXED_JOB,
        &[
            (
                "subdomain: lorarun-nodes",
                "subdomain: lorarun",
                "the name of the Service, lorarun-nodes",
            ),
            ("      subdomain: lorarun-nodes\n", "", "the name of the Service, lorarun-nodes"),
            (
                "value: lorarun-0.",
                "value: lorarun-1.",
                "`MASTER_ADDR` should be lorarun-0.lorarun-nodes",
            ),
            (
                "name: LORARUN_NODES\n              value: \"2\"",
                "name: LORARUN_NODES\n              value: \"3\"",
                "should be 2",
            ),
            ("name: LORARUN_TOKEN", "name: TOKEN", "whoever reaches the port"),
            ("containerPort: 29500", "containerPort: 29400", "`ports` of the container"),
            ("port: 29500", "port: 29400", "`ports` of the Service"),
            ("clusterIP: None", "clusterIP: \"\"", "should be None"),
            (
                "publishNotReadyAddresses: true",
                "publishNotReadyAddresses: false",
                "before any of them is ready",
            ),
            ("job-name: lorarun", "job-name: other", "selects other pods"),
        ],
    );
    let (_, job) = INDEXED_JOB.split_once("---\n").unwrap();
    let faults = faults_of(job).unwrap();
    assert!(
        faults.iter().any(|fault| fault.contains("a headless Service is missing")),
        "{faults:?}"
    );
}

#[test]
fn a_jobset_that_is_wrong_is_caught() {
    assert_caught(
        JOBSET,
        &[
            ("enableDNSHostnames: true", "enableDNSHostnames: false", "should give pods names"),
            (
                "enableDNSHostnames: true",
                "enableDNSHostname: true",
                "did you mean `enableDNSHostnames`?",
            ),
            ("replicatedJobs:", "replicatedJob:", "should be a list"),
            ("replicas: 1", "replicas: 2", "should be 1"),
            ("maxRestarts: 0", "maxRestarts: -1", "from 0, got: -1"),
            (
                "subdomain: lorarun-nodes",
                "subdomain: other",
                "`MASTER_ADDR` should be lorarun-nodes-0-0.other",
            ),
            ("completionMode: Indexed", "completionMode: indexd", "should be Indexed"),
            ("parallelism: 2", "paralelism: 2", "did you mean `parallelism`?"),
            ("name: lorarun\n", "name: Lorarun\n", "cannot be a name, got: Lorarun"),
        ],
    );
}

#[test]
fn a_train_job_that_is_wrong_is_caught() {
    assert_caught(
        TRAINJOB,
        &[
            ("torch: {}", "tourch: {}", "did you mean `torch`?"),
            ("torch: {}", "mpi: {}", "are not told of each other"),
            (
                "- name: node\n          template",
                "- name: nodes\n          template",
                "the name `node`",
            ),
            ("ancestor-step: trainer", "ancestor-step: node", "would not find the job"),
            ("values: [75]", "values: [70]", "exit code 75 should be Ignore"),
            ("    kind: TrainingRuntime\n", "", "names none of the runtimes"),
            ("numNodes: 2\n    # Said", "numNodes: 0\n    # Said", "from 1, got: 0"),
            ("numProcPerNode: 4", "numProcPerNode: auto", "a number from 1, got: \"auto\""),
            ("numProcPerNode: 4", "numProcPerNode: 3", "should be equal, got: 3 and 4"),
            ("command: [\"lorarun\"]", "command: [\"torchrun\"]", "should be lorarun"),
            ("\"--resume\", \"auto\"", "\"--seed\", \"1\"", "would begin anew"),
            ("runtimeRef:", "runtimeReference:", "names none of the runtimes"),
        ],
    );
}

#[test]
fn what_runs_nothing_is_no_manifest() {
    assert!(faults_of("a: [").unwrap_err().to_string().starts_with("this is no YAML"));
    assert!(faults_of("apiVersion: v1").unwrap_err().to_string().contains("has no `kind`"));
    let service = INDEXED_JOB.split_once("---\n").unwrap().0;
    assert!(faults_of(service).unwrap_err().to_string().contains("no document is a Job"));
    let old = INDEXED_JOB.replace("batch/v1\n", "batch/v1beta1\n");
    let said = faults_of(&old).unwrap_err().to_string();
    assert_eq!(said, "Job lorarun: `apiVersion` should be batch/v1, got: batch/v1beta1");
}
