//! The OpenMP runtime that torch brings along, when it is there.

use std::sync::OnceLock;

use halfbyte::gemm::Parallel;

/// Its way to run a function on its threads. Looked for at the first call, which comes after torch is loaded: whoever
/// multiplies with several threads does so for torch. Nothing after a fork: the runtime's threads stayed in the parent.
pub fn parallel() -> Option<Parallel> {
    static FOUND: OnceLock<Option<(u32, Parallel)>> = OnceLock::new();
    let (process, parallel) = (*FOUND.get_or_init(|| find().map(|parallel| (std::process::id(), parallel))))?;
    (process == std::process::id()).then_some(parallel)
}

/// GCC's runtime, if this process has loaded it; torch's own copy before any other.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn find() -> Option<Parallel> {
    use std::ffi::{CString, c_char, c_int, c_void};

    unsafe extern "C" {
        fn dlopen(file: *const c_char, mode: c_int) -> *mut c_void;
        fn dlsym(library: *mut c_void, symbol: *const c_char) -> *mut c_void;
    }
    const RTLD_NOW: c_int = 2;
    const RTLD_NOLOAD: c_int = 4;

    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut files: Vec<&str> = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .filter(|file| file.rsplit('/').next().is_some_and(|name| name.starts_with("libgomp")))
        .collect();
    files.sort_by_key(|file| !file.contains("/torch"));
    let file = CString::new(*files.first()?).ok()?;
    // SAFETY: the library is loaded already and stays so, as torch does; both strings end with a zero.
    let symbol = unsafe {
        let library = dlopen(file.as_ptr(), RTLD_NOW | RTLD_NOLOAD);
        if library.is_null() {
            return None;
        }
        dlsym(library, c"GOMP_parallel".as_ptr())
    };
    // SAFETY: the symbol of this name is this function, in every version of the library.
    (!symbol.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) })
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn find() -> Option<Parallel> {
    None
}
