//! CUDA's driver: the only folder that names cudarc. Its library is opened when first asked for, never linked.
//!
//! A [`Device`] holds its primary context, the one that torch uses, retained for the life of the process; modules are
//! loaded into it once and stay. Each call binds that context to its thread and puts back what was bound before
//! (in a thread that had none it leaves that of the first device, as the runtime would).

mod device;
mod launch;
mod library;
mod loading;
mod tensor_map;

pub use device::Device;
pub use launch::Stream;
pub use library::{device_count, device_memory, device_of, supported_cuda};
pub use tensor_map::{TensorMap, TileType};
