//! Compiles `kernels/` by way of `kernels/build_kernels.py`, and writes `kernels.rs`: every kernel's name, shape and code, and the
//! constants of its source.
//!
//! NVIDIA's compilers come as Python packages (requirements/kernels.txt), which the build of a wheel brings. Without them
//! there is no code: names and constants are then those of `kernels.lock.json`, and a warning says so.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

/// What `kernels/build_kernels.py` ends with when the packages are not there.
const MISSING_TOOLS: i32 = 3;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../..");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=PYO3_PYTHON");
    println!("cargo:rerun-if-env-changed=HALFBYTE_NVIDIA");
    println!("cargo:rerun-if-env-changed=HALFBYTE_CUBINS");
    for name in ["kernels.lock.json", "build_kernels.py", "../requirements/kernels.txt"] {
        println!("cargo:rerun-if-changed={}", root.join("kernels").join(name).display());
    }
    // Of a folder cargo looks at all that is in it. The emulator compiles kernels for the processor: not here.
    for entry in fs::read_dir(root.join("kernels"))? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type()?.is_dir() && name != "emulator" && name != "__pycache__" {
            println!("cargo:rerun-if-changed={}", entry.path().display());
        }
    }

    let built = compile(&root, &out)?;
    if let Err(problem) = &built {
        println!("cargo:warning=this build has no CUDA kernels: {problem}");
        // The environment of a wheel's build is not that of the build before.
        println!("cargo:rerun-if-env-changed=PYTHONPATH");
        println!("cargo:rerun-if-env-changed=VIRTUAL_ENV");
    }
    let (description, packed) = match built {
        Ok(()) => (out.join("kernels.json"), read(&out.join("images.json"))?),
        Err(_) => {
            fs::write(out.join("kernels.bin"), [])?;
            (root.join("kernels/kernels.lock.json"), json!({"families": [], "images": []}))
        }
    };
    fs::write(out.join("kernels.rs"), generate(&read(&description)?, &packed)?)?;
    Ok(())
}

fn read(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(serde_json::from_str(&text)?)
}

/// Runs `kernels/build_kernels.py`; gives why there is nothing to compile with.
fn compile(root: &Path, out: &Path) -> Result<std::result::Result<(), String>> {
    let asked = env::var_os("PYO3_PYTHON").filter(|python| !python.is_empty());
    let interpreters = asked.map_or_else(|| vec!["python3".into(), "python".into()], |python| vec![python]);
    for python in interpreters {
        let mut command = Command::new(&python);
        // No bytecode: a source folder stays as it is.
        command.arg("-B").arg(root.join("kernels/build_kernels.py")).args(["build", "--out"]).arg(out);
        if let Ok(jobs) = env::var("NUM_JOBS") {
            command.args(["--jobs", &jobs]);
        }
        if env::var_os("CARGO_FEATURE_TEST_KERNELS").is_some() {
            command.arg("--test-kernels");
        }
        let Ok(done) = command.output() else {
            continue;
        };
        let words = String::from_utf8_lossy(&done.stderr);
        return match done.status.code() {
            Some(0) => Ok(Ok(())),
            Some(MISSING_TOOLS) => Ok(Err(words.trim().trim_start_matches("error: ").to_owned())),
            _ => Err(format!("kernels/build_kernels.py failed:\n{words}").into()),
        };
    }
    Ok(Err("there is no Python to compile them with (PYO3_PYTHON names one)".to_owned()))
}

/// A kernel of several modules: its code for each.
#[derive(Default)]
struct Kernel {
    threads: u64,
    dynamic_shared: bool,
    for_tests: bool,
    ptx: Vec<String>,
    cubins: Vec<String>,
}

/// Where an image is: the number of its family, its place and length in that one's code, and its checksum.
type Place = [u64; 4];

fn generate(description: &Value, packed: &Value) -> Result<String> {
    let absent = || "kernels.json or images.json lacks a field";
    let number = |value: &Value, name: &str| value[name].as_u64().ok_or_else(absent);
    let mut families = Vec::new();
    for family in packed["families"].as_array().ok_or_else(absent)? {
        let (at, bytes, size) = (number(family, "at")?, number(family, "bytes")?, number(family, "size")?);
        families.push(format!("Family::new({at}, {bytes}, {size})"));
    }
    let mut code = BTreeMap::new();
    for image in packed["images"].as_array().ok_or_else(absent)? {
        let text = |name: &str| image[name].as_str().map(str::to_owned).ok_or_else(absent);
        let number = |name: &str| number(image, name);
        let place: Place = [number("family")?, number("at")?, number("size")?, number("crc32")?];
        code.insert((text("kernel")?, text("kind")?, text("arch")?), place);
    }
    let mut kernels: BTreeMap<String, Kernel> = BTreeMap::new();
    for module in description["modules"].as_object().ok_or_else(absent)?.values() {
        let arch = module["arch"].as_str().ok_or_else(absent)?.to_owned();
        for (name, about) in module["kernels"].as_object().ok_or_else(absent)? {
            let kernel = kernels.entry(name.clone()).or_default();
            kernel.threads = about["threads"].as_u64().ok_or_else(absent)?;
            kernel.dynamic_shared = about["dynamic_shared"].as_bool().ok_or_else(absent)?;
            kernel.for_tests = about["for_tests"].as_bool().ok_or_else(absent)?;
            kernel.ptx.push(arch.clone());
            if !kernel.for_tests {
                let machines = module["cubins"].as_array().ok_or_else(absent)?;
                kernel.cubins.extend(machines.iter().filter_map(Value::as_str).map(str::to_owned));
            }
        }
    }

    let mut text = String::new();
    let bytes = if code.is_empty() { "&[]" } else { "include_bytes!(concat!(env!(\"OUT_DIR\"), \"/kernels.bin\"))" };
    writeln!(text, "/// Whether this build has code.\npub const BUILT: bool = {};", !code.is_empty())?;
    writeln!(text, "static CODE: &[u8] = {bytes};")?;
    writeln!(text, "static FAMILIES: [Family; {}] = [{}];\n", families.len(), families.join(", "))?;
    for (index, (name, kernel)) in kernels.iter().enumerate() {
        let list = |kind: &str, architectures: &[String]| -> Result<String> {
            let mut list = Vec::new();
            for arch in architectures {
                let place = code.get(&(name.clone(), kind.to_owned(), arch.clone()));
                list.push((number_of(arch)?, image(arch, place.copied())?));
            }
            // Older ones first.
            list.sort();
            Ok(list.into_iter().map(|(_, image)| image).collect::<Vec<_>>().join(", "))
        };
        let (ptx, cubins) = (list("ptx", &kernel.ptx)?, list("cubin", &kernel.cubins)?);
        let Kernel { threads, dynamic_shared, for_tests, .. } = kernel;
        writeln!(
            text,
            "/// `{name}`\npub static {}: Kernel = Kernel {{ index: {index}, name: {name:?}, threads: {threads}, \
             dynamic_shared: {dynamic_shared}, for_tests: {for_tests}, ptx: &[{ptx}], cubins: &[{cubins}] }};",
            name.to_uppercase()
        )?;
    }
    let names = kernels.keys().map(|name| format!("&{}", name.to_uppercase())).collect::<Vec<_>>().join(", ");
    writeln!(text, "\n/// Every kernel.\npub static ALL: [&Kernel; {}] = [{names}];\n", kernels.len())?;

    for (stem, constants) in description["constants"].as_object().ok_or_else(absent)? {
        writeln!(text, "/// Constants of `{stem}`.\npub mod {stem} {{")?;
        for (name, value) in constants.as_object().ok_or_else(absent)? {
            let value = value.as_u64().ok_or_else(absent)?;
            writeln!(text, "    #[allow(missing_docs)]\n    pub const {name}: usize = {value};")?;
        }
        writeln!(text, "}}")?;
    }
    Ok(text)
}

/// `"90a"` is 90.
fn number_of(arch: &str) -> Result<i32> {
    Ok(arch.trim_end_matches('a').parse()?)
}

fn image(arch: &str, place: Option<Place>) -> Result<String> {
    let (number, exact) = (number_of(arch)?, arch.ends_with('a'));
    let [family, at, size, crc32] = place.unwrap_or_default();
    Ok(format!(
        "Image {{ capability: Capability({}, {}), exact: {exact}, family: {family}, at: {at}, size: {size}, \
         crc32: {crc32} }}",
        number / 10,
        number % 10
    ))
}
