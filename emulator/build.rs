//! Compiles the kernels of the engine, and what runs them, with the host's C++ compiler.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Written around each module: its kernels get a list, its other names a namespace of their own.
const AROUND: &str = r#"#include "prelude.cuh"
static const emulated::Kernel* emulated_kernels = nullptr;
namespace module_MODULE {
#include "MODULE.cu"
}
extern "C" const emulated::Kernel* emulated_MODULE() { return emulated_kernels; }
"#;

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let kernels = root.join("../engine/kernels");
    println!("cargo:rerun-if-changed={}", kernels.display());
    for name in ["host.h", "machine.h", "fibers.cpp", "collectives.cpp", "watch.cpp"] {
        println!("cargo:rerun-if-changed={name}");
    }
    let modules = modules(&[&kernels, &root.join("kernels")]);
    let mut build = cc::Build::new();
    build.cpp(true).cpp_link_stdlib(None).std("c++17").opt_level(2).warnings(false).debug(false);
    build.include(&kernels).include(root.join("kernels")).include(&root);
    build.define("LORARUN_HOST", None);
    // No part of the C++ library is needed; shared memory is the thread's, and often asked for.
    for flag in ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"] {
        build.flag(flag);
    }
    build.flag("-ftls-model=initial-exec").flag("-Wall").flag("-Wno-unknown-pragmas");
    build.flag("-Wno-unused-function").flag("-Wno-unused-variable");
    if let Err(error) = try_compiler(&build) {
        eprintln!("a C++ compiler is needed to compile the kernels for the host: {error}");
        eprintln!("hint: install `g++`, or name one in the environment variable `CXX`");
        std::process::exit(1);
    }
    let mut around = build.clone();
    // Alignment and every access are checked; fibers.cpp and watch.cpp hold what is called.
    around.flag("-fsanitize=alignment,kernel-address");
    for parameter in
        ["asan-instrumentation-with-call-threshold=0", "asan-stack=0", "asan-globals=0"]
    {
        around.flag("--param").flag(parameter);
    }
    for module in &modules {
        let file = out.join(format!("{module}.cpp"));
        write_changed(&file, &AROUND.replace("MODULE", module));
        around.file(file);
    }
    write_changed(&out.join("modules.rs"), &table(&modules));
    // In this order: modules call what runs them.
    around.compile("lorarun_emulated_modules");
    build.file("fibers.cpp").file("collectives.cpp").file("watch.cpp").compile("lorarun_emulator");
}

/// Fails unless there is a compiler that starts.
fn try_compiler(build: &cc::Build) -> Result<(), String> {
    let compiler = build.try_get_compiler().map_err(|error| error.to_string())?;
    let output = compiler.to_command().arg("--version").output();
    output.map(|_| ()).map_err(|error| format!("`{}`: {error}", compiler.path().display()))
}

/// Names of the `.cu` files of `folders`, sorted.
fn modules(folders: &[&Path]) -> Vec<String> {
    let mut names = Vec::new();
    for folder in folders {
        println!("cargo:rerun-if-changed={}", folder.display());
        let entries = fs::read_dir(folder).expect("the kernels' folder can be read");
        for path in entries.map(|entry| entry.expect("an entry").path()) {
            println!("cargo:rerun-if-changed={}", path.display());
            if path.extension().is_some_and(|e| e == "cu") {
                let stem = path.file_stem().and_then(|s| s.to_str()).expect("a name in UTF-8");
                names.push(stem.to_owned());
            }
        }
    }
    names.sort();
    names
}

/// Rust source: the functions that give each module's list, and a table of them.
fn table(modules: &[String]) -> String {
    let mut text = "unsafe extern \"C\" {\n".to_owned();
    for module in modules {
        let _ = writeln!(text, "    fn emulated_{module}() -> *const Kernel;");
    }
    let _ = writeln!(text, "}}\nstatic MODULES: &[(&str, ListOf)] = &[");
    for module in modules {
        let _ = writeln!(text, "    (\"{module}\", emulated_{module}),");
    }
    text + "];\n"
}

/// Leaves the file alone if it says the same, so that nothing is compiled again.
fn write_changed(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return;
    }
    fs::write(path, text).expect("cargo's output folder can be written");
}
