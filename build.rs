//! Compiles bpf/kubelane.bpf.c into a skeleton, and turns the enums of bpf/abi.h and bpf/observe.h into Rust constants, so
//! that the two sides cannot drift apart.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));

    let headers = ["bpf/abi.h", "bpf/observe.h"];
    let rust = headers.map(|path| rust_enums(&fs::read_to_string(path).expect("the headers are readable"), path));
    fs::write(out.join("abi_enums.rs"), rust.concat()).expect("OUT_DIR is writable");

    libbpf_cargo::SkeletonBuilder::new()
        .source("bpf/kubelane.bpf.c")
        .clang_args(clang_arguments())
        .build_and_generate(out.join("kubelane.skel.rs"))
        .expect("bpf/kubelane.bpf.c compiles (clang, libelf and zlib headers are needed: make setup)");
}

/// The kernel's user-space headers include <asm/types.h>, which Debian keeps in a directory of the architecture.
fn clang_arguments() -> Vec<String> {
    let mut arguments: Vec<String> = ["-Wall", "-Wextra", "-Werror", "-mcpu=v3", "-O2"].map(String::from).to_vec();
    // BTF names the source files. Without their directory, two checkouts build the same binary.
    let directory = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    arguments.push(format!("-ffile-prefix-map={directory}=."));
    let triple = Command::new("clang").arg("-print-target-triple").output().ok();
    let triple = triple.and_then(|o| String::from_utf8(o.stdout).ok()).unwrap_or_default();
    for name in [triple.trim().replace("-pc-", "-"), triple.trim().to_owned()] {
        let directory = format!("/usr/include/{name}");
        if !name.is_empty() && Path::new(&directory).join("asm/types.h").exists() {
            arguments.push(format!("-I{directory}"));
            break;
        }
    }
    arguments
}

/// `enum name { A = 1, ... };` becomes `pub mod name { pub const A: u32 = 1; ... }`, and `NAMES` for enum counter.
fn rust_enums(header: &str, path: &str) -> String {
    let mut rust = String::new();
    for block in header.split("\nenum ").skip(1) {
        let (name, rest) = block.split_once(" {").expect("enum NAME {");
        let (body, _) = rest.split_once("};").expect("enum ends with };");
        let mut names = String::new();
        let _ = writeln!(rust, "/// `enum {name}` of {path}.\npub mod {name} {{");
        for line in body.lines().map(str::trim) {
            assert!(!line.ends_with('='), "one enumerator a line: {line}");
            let Some((constant, value)) = line.split_once(" = ") else { continue };
            let (value, comment) = value.split_once(',').expect("one enumerator a line, ending with a comma");
            let comment = comment.trim().trim_start_matches("/*").trim_end_matches("*/").trim();
            if !comment.is_empty() {
                let _ = writeln!(rust, "    #[doc = {comment:?}]");
            }
            let _ = writeln!(rust, "    pub const {constant}: u32 = {value};");
            if !constant.ends_with("_MAX") {
                let label = constant.trim_start_matches("COUNTER_").to_lowercase();
                let _ = writeln!(names, "        ({label:?}, {comment:?}),");
            }
        }
        if name == "counter" {
            let _ = writeln!(
                rust,
                "    /// Label and meaning of each counter, by index.\n    pub const NAMES: [(&str, &str); COUNTER_MAX as usize] = [\n{names}    ];"
            );
        }
        let _ = writeln!(rust, "}}");
    }
    rust
}
