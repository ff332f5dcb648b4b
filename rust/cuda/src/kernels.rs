//! The compiled kernels, which of their images a device takes, and in which order they are tried.
//!
//! The build script writes what is known of each kernel: see `build.rs` and `kernels/build_kernels.py`.

use super::capability::Capability;
use super::family::Family;

/// A kernel of `kernels/`, which is a module of its own.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its place in [`ALL`].
    pub index: usize,
    /// Its name in the module.
    pub name: &'static str,
    /// Threads of each block.
    pub threads: u32,
    /// Whether it takes dynamic shared memory.
    pub dynamic_shared: bool,
    /// Whether it is for tests and benches, which builds leave out without the feature `test-kernels`.
    pub for_tests: bool,
    /// For virtual architectures, the older first.
    pub(super) ptx: &'static [Image],
    /// Assembled for GPUs, the older first.
    pub(super) cubins: &'static [Image],
}

/// One kernel for one architecture.
#[derive(Debug, PartialEq, Eq)]
pub struct Image {
    pub(super) capability: Capability,
    /// Whether it is for its capability alone, not for later ones: those with warpgroup products are.
    pub(super) exact: bool,
    /// Which of `FAMILIES` it is part of, where it is in that one's code, how long, and its checksum; 0 in a build
    /// without it.
    pub(super) family: usize,
    pub(super) at: usize,
    pub(super) size: usize,
    pub(super) crc32: u32,
}

/// What an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Code for GPUs of one architecture, which only has to be copied.
    Cubin,
    /// What the driver compiles.
    Ptx,
}

impl Form {
    /// As `HALFBYTE_KERNELS` and `halfbyte doctor` call it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cubin => "cubin",
            Self::Ptx => "ptx",
        }
    }
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

impl Kernel {
    /// Whether there is an image for a device, in this build or in a complete one.
    pub fn suits(&self, device: Capability) -> bool {
        self.ptx(device).is_some() || self.cubin(device).is_some()
    }

    /// Whether this build has code of it.
    pub fn is_built(&self) -> bool {
        self.ptx.iter().any(Image::is_built)
    }

    /// The image of a form for a device.
    pub fn image(&self, form: Form, device: Capability) -> Option<&'static Image> {
        match form {
            Form::Cubin => self.cubin(device),
            Form::Ptx => self.ptx(device),
        }
    }

    /// PTX is for its capability and all later ones.
    fn ptx(&self, device: Capability) -> Option<&'static Image> {
        let suits = |i: &Image| if i.exact { i.capability == device } else { i.capability <= device };
        self.ptx.iter().rev().find(|image| suits(image))
    }

    /// A cubin is for its capability and later ones of the same major number.
    fn cubin(&self, device: Capability) -> Option<&'static Image> {
        let suits = |i: &Image| {
            if i.exact { i.capability == device } else { i.capability.0 == device.0 && i.capability.1 <= device.1 }
        };
        self.cubins.iter().rev().find(|image| suits(image))
    }
}

impl Image {
    /// The architecture's name, as compilers write it: `sm_90`.
    pub fn architecture(&self) -> String {
        let Capability(major, minor) = self.capability;
        format!("sm_{major}{minor}{}", if self.exact { "a" } else { "" })
    }

    /// Whether this build has it.
    pub fn is_built(&self) -> bool {
        self.size > 0
    }

    /// The code, unpacked: PTX with a zero at its end, or a cubin.
    ///
    /// # Errors
    /// In words that go on after "it", when this build has none, or when it is not what the compiler gave.
    pub fn code(&self) -> Result<&'static [u8], String> {
        let Some(family) = FAMILIES.get(self.family).filter(|_| self.is_built()) else {
            return Err("is not in this build".to_owned());
        };
        let damaged = |why: &str| format!("is damaged in this build, install halfbyte again: {why}");
        let code = family.code(CODE).map_err(damaged)?.get(self.at..).and_then(|rest| rest.get(..self.size));
        let code = code.ok_or_else(|| damaged("it is shorter than it should be"))?;
        if crc32fast::hash(code) == self.crc32 { Ok(code) } else { Err(damaged("its checksum is wrong")) }
    }
}
