//! Hub ids against a server of this process that speaks what `hf-hub` asks for.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use formats::hub::{HubOptions, is_hub_id};
use formats::{BaseModel, FormatError, OpenOptions, open_base_model, open_base_model_with};
use serde_json::json;

use crate::support::data;

const ID: &str = "someone/small-model";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one repository; it lives as long as the test process.
struct Server {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

type Files = BTreeMap<String, PathBuf>;

impl Server {
    fn start(files: Files) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = serve(&stream.unwrap(), &files, &log);
            }
        });
        Self { endpoint, requests }
    }

    /// Paths asked for since the last call.
    fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

fn serve(stream: &TcpStream, files: &Files, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut start = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            start = Some(range.to_owned());
        }
    }
    log.lock().unwrap().push(path.clone());
    let answer = |status: &str, headers: &str, body: &[u8]| {
        let mut stream = stream;
        write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n",
            body.len()
        )?;
        stream.write_all(body)
    };
    if path == format!("/api/models/{ID}/revision/main") || path == format!("/api/models/{ID}") {
        let siblings: Vec<_> = files.keys().map(|name| json!({"rfilename": name})).collect();
        let info = json!({"siblings": siblings, "sha": COMMIT}).to_string();
        return answer("200 OK", "content-type: application/json\r\n", info.as_bytes());
    }
    let name = path.strip_prefix(&format!("/{ID}/resolve/main/"));
    let Some(file) = name.and_then(|name| files.get(name)) else {
        return answer("404 Not Found", "", b"");
    };
    let bytes = fs::read(file)?;
    let range = start.unwrap_or_else(|| "0-".to_owned());
    let (from, to) = range.split_once('-').unwrap();
    let from: usize = from.parse().unwrap();
    let to = to.parse().map_or(bytes.len(), |to: usize| (to + 1).min(bytes.len()));
    let headers = format!(
        "etag: \"{}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {from}-{}/{}\r\n",
        name.unwrap_or_default().replace('/', "-"),
        to.max(1) - 1,
        bytes.len()
    );
    answer("206 Partial Content", &headers, &bytes[from..to])
}

/// The small SD1 model's files under the names of a repository.
fn model_files() -> Files {
    let mut files = Files::new();
    for folder in ["unet", "text_encoder", "vae", "scheduler"] {
        for entry in fs::read_dir(data(&format!("parity/model/{folder}"))).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            files.insert(format!("{folder}/{name}"), entry.path());
        }
    }
    files.insert("model_index.json".into(), data("parity/model/model_index.json"));
    files.insert("README.md".into(), data("parity/README.md"));
    files
}

fn options(server: &Server, cache: &Path) -> HubOptions {
    HubOptions {
        endpoint: server.endpoint.clone(),
        cache_dir: cache.join("hub"),
        offline: false,
        progress: false,
    }
}

fn open(hub: &HubOptions) -> Result<BaseModel, FormatError> {
    open_base_model_with(ID, &OpenOptions::default(), hub)
}

fn assert_is_the_model(model: &BaseModel) {
    let local =
        open_base_model(data("parity/model").to_str().unwrap(), &OpenOptions::default()).unwrap();
    for (ours, theirs) in [
        (&model.unet, &local.unet),
        (&model.text_encoder, &local.text_encoder),
        (&model.vae, &local.vae),
    ] {
        assert_eq!(ours.names(), theirs.names());
        for name in ours.names() {
            assert_eq!(ours.get(&name).unwrap(), theirs.get(&name).unwrap(), "{name}");
        }
    }
    assert_eq!(model.unet_config, local.unet_config);
    assert_eq!(model.scheduler_config, local.scheduler_config);
    assert_eq!(model.name, ID);
    assert_eq!(model.identity.sha256().unwrap(), None);
}

#[test]
fn a_model_is_downloaded_once_and_then_comes_from_the_cache() {
    let server = Server::start(model_files());
    let cache = tempfile::tempdir().unwrap();
    let mut hub = options(&server, cache.path());
    assert_is_the_model(&open(&hub).unwrap());
    let asked = server.take_requests();
    let weights = format!("/{ID}/resolve/main/unet/diffusion_pytorch_model.safetensors");
    assert!(asked.contains(&weights), "{asked:?}");
    assert!(!asked.iter().any(|path| path.ends_with("README.md")), "{asked:?}");

    assert_is_the_model(&open(&hub).unwrap());
    let asked = server.take_requests();
    assert_eq!(asked.len(), 1, "only the commit is asked for: {asked:?}");

    hub.offline = true;
    assert_is_the_model(&open(&hub).unwrap());
    assert!(server.take_requests().is_empty());

    // A hub out of reach: the cache is used and that is said.
    hub.offline = false;
    hub.endpoint = "http://127.0.0.1:9".to_owned();
    let model = open(&hub).unwrap();
    assert_is_the_model(&model);
    assert!(model.notes[0].contains("out of reach"), "{:?}", model.notes);
}

#[test]
fn several_ranks_at_once_download_once() {
    let server = Server::start(model_files());
    let cache = tempfile::tempdir().unwrap();
    let hub = options(&server, cache.path());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_is_the_model(&open(&hub).unwrap()));
        }
    });
    let asked = server.take_requests();
    let weights =
        asked.iter().filter(|path| path.ends_with("unet/diffusion_pytorch_model.safetensors"));
    // One for its size, one for its bytes.
    assert_eq!(weights.count(), 2, "{asked:?}");
}

#[test]
fn what_cannot_be_had_is_an_error_with_a_hint() {
    let server = Server::start(model_files());
    let cache = tempfile::tempdir().unwrap();
    let mut hub = options(&server, cache.path());
    let error = |id: &str, hub: &HubOptions| {
        open_base_model_with(id, &OpenOptions::default(), hub).unwrap_err().to_string()
    };
    let text = error("someone/else", &hub);
    assert!(
        text.contains("`someone/else`") && text.contains("404") && text.contains("hint: "),
        "{text}"
    );
    hub.offline = true;
    let text = error(ID, &hub);
    assert!(text.contains("`HF_HUB_OFFLINE` is set") && text.contains("hint: "), "{text}");
    hub.offline = false;
    hub.endpoint = "http://127.0.0.1:9".to_owned();
    let text = error(ID, &hub);
    assert!(text.contains("`http://127.0.0.1:9` answered: "), "{text}");
}

#[test]
fn a_repository_without_diffusers_folders_says_so() {
    let files = Files::from([("README.md".to_owned(), data("parity/README.md"))]);
    let server = Server::start(files);
    let cache = tempfile::tempdir().unwrap();
    let text = open(&options(&server, cache.path())).unwrap_err().to_string();
    assert!(text.contains("no weights in `unet/`") && text.contains("hint: "), "{text}");
}

#[test]
fn variants_and_vaes_come_by_id_too() {
    let mut files = model_files();
    let weights = files.remove("unet/diffusion_pytorch_model.safetensors").unwrap();
    files.insert("unet/diffusion_pytorch_model.fp16.safetensors".into(), weights);
    let server = Server::start(files);
    let cache = tempfile::tempdir().unwrap();
    let hub = options(&server, cache.path());
    let fp16 = OpenOptions { variant: Some("fp16".into()), ..OpenOptions::default() };
    assert_is_the_model(&open_base_model_with(ID, &fp16, &hub).unwrap());

    let vae = OpenOptions { vae: Some(ID.to_owned()), ..OpenOptions::default() };
    let cache = tempfile::tempdir().unwrap();
    let hub = options(&server, cache.path());
    server.take_requests();
    let base = data("parity-sd2/model");
    let model = open_base_model_with(base.to_str().unwrap(), &vae, &hub).unwrap();
    assert_eq!(model.vae_identity.unwrap().name, ID);
    assert_eq!(model.vae_config.unwrap()["scaling_factor"], 0.18215);
    let asked = server.take_requests();
    assert!(!asked.iter().any(|path| path.contains("diffusion_pytorch_model.fp16")), "{asked:?}");
}

/// The environment is read in a process of its own: variables are global to a process.
#[test]
fn the_environment_is_honoured() {
    let server = Server::start(model_files());
    let home = tempfile::tempdir().unwrap();
    let child = |endpoint: &str, offline: &str| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hub::child_of_the_environment_test", "--ignored", "--nocapture"])
            .env("HF_ENDPOINT", endpoint)
            .env("HF_HOME", home.path())
            .env("HF_HUB_OFFLINE", offline)
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (_, text) = child(&server.endpoint, "1");
    assert!(text.contains("`HF_HUB_OFFLINE` is set"), "{text}");
    assert!(server.take_requests().is_empty());
    let (success, text) = child(&server.endpoint, "0");
    assert!(success && text.contains("opened"), "{text}");
    assert!(home.path().join("hub/models--someone--small-model/refs/main").is_file());
    server.take_requests();
    let (success, text) = child("http://127.0.0.1:9", "true");
    assert!(success && text.contains("opened"), "{text}");
    assert!(server.take_requests().is_empty());
}

#[test]
#[ignore = "run by `the_environment_is_honoured` with its environment"]
fn child_of_the_environment_test() {
    match open_base_model(ID, &OpenOptions::default()) {
        Ok(model) => println!("opened {}", model.path.display()),
        Err(error) => println!("{error}"),
    }
}

#[test]
fn hub_ids_are_told_from_paths() {
    for id in ["runwayml/stable-diffusion-v1-5", "a/b", "A_1/x.y-z"] {
        assert!(is_hub_id(id), "{id}");
    }
    for path in ["", "a", "/a/b", "a/b/c", "./a", "../a", "a/..", "a b/c", "a/", "/a", "C:/x"] {
        assert!(!is_hub_id(path), "{path}");
    }
}
