//! What a tensor of Python's is, read from the object itself: by the C functions that torch offers for that, one call in
//! place of a method of Python for each property.
//!
//! The interface is DLPack's (`DLPackExchangeAPI` of dlpack.h 1.2, in torch since 2.10). Where it is missing, callers ask
//! by Python.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use halfbyte::dtype::DType;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// Layouts of this major version are the ones below.
const MAJOR_VERSION: u32 = 1;
/// `kDLCPU`.
const CPU: i32 = 1;
/// `DLDataTypeCode`: kDLInt, kDLUInt, kDLFloat, kDLBfloat.
const INT: u8 = 0;
const UINT: u8 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

#[repr(C)]
struct DLDevice {
    kind: i32,
    index: i32,
}

#[repr(C)]
struct DLDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DLTensor {
    data: *mut c_void,
    device: DLDevice,
    ndim: i32,
    dtype: DLDataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

type Read = unsafe extern "C" fn(object: *mut c_void, out: *mut DLTensor) -> c_int;

/// `DLPackExchangeAPI`; functions that are not called are plain addresses.
#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    previous: *const ExchangeApi,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object: *const c_void,
    managed_tensor_to_py_object: *const c_void,
    dltensor_from_py_object: Option<Read>,
    current_work_stream: *const c_void,
}

struct Reader {
    read: Read,
    class: Py<PyType>,
}

static READER: OnceLock<Reader> = OnceLock::new();

/// A contiguous tensor with elements, in memory of the processor.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    pub address: usize,
    pub count: usize,
    pub dtype: DType,
    /// The lengths of the dimensions: torch's own memory, to be read before anything of Python's runs.
    pub shape: &'a [i64],
}

impl Tensor<'_> {
    /// Whether it has so many elements of that dtype, at an address that suits it.
    pub fn is(&self, count: usize, dtype: DType) -> bool {
        self.count == count && self.dtype == dtype && self.is_aligned()
    }

    /// Whether it has floats, at an address that suits them.
    pub fn is_float(&self) -> bool {
        DType::FLOATS.contains(&self.dtype) && self.is_aligned()
    }

    fn is_aligned(&self) -> bool {
        self.address.is_multiple_of(self.dtype.size())
    }
}

/// Read tensors of this class and of those derived from it; whether it can be done.
#[pyfunction]
pub fn read_tensors_of(class: Bound<'_, PyType>) -> bool {
    let Ok(capsule) = class.getattr("__dlpack_c_exchange_api__") else {
        return false;
    };
    // SAFETY: a capsule or not, checked by its name; the error that it sets is taken away.
    let api = unsafe {
        let api = ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dlpack_exchange_api".as_ptr());
        if api.is_null() {
            ffi::PyErr_Clear();
            return false;
        }
        // Static by the interface's rules.
        &*api.cast::<ExchangeApi>()
    };
    match api.dltensor_from_py_object {
        Some(read) if api.major == MAJOR_VERSION => {
            let _ = READER.set(Reader { read, class: class.unbind() });
            true
        }
        _ => false,
    }
}

/// The tensor, or `None` if it has to be asked by Python: one that is not contiguous or empty, that is elsewhere or of a
/// dtype that packed weights are not stored in, or whose class has nothing to do with the one that [`read_tensors_of`] knows.
pub fn tensor<'a>(object: Borrowed<'a, '_, PyAny>) -> Option<Tensor<'a>> {
    let reader = READER.get()?;
    let mut found = DLTensor {
        data: std::ptr::null_mut(),
        device: DLDevice { kind: 0, index: 0 },
        ndim: 0,
        dtype: DLDataType { code: 0, bits: 0, lanes: 0 },
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    // SAFETY: the object's class is the reader's or derived from it, as its function demands, and the GIL is held.
    unsafe {
        let class: *mut ffi::PyTypeObject = reader.class.as_ptr().cast();
        if ffi::PyObject_TypeCheck(object.as_ptr(), class) == 0 {
            return None;
        }
        if (reader.read)(object.as_ptr().cast(), &raw mut found) != 0 {
            ffi::PyErr_Clear();
            return None;
        }
    }
    if found.device.kind != CPU || found.dtype.lanes != 1 || found.data.is_null() {
        return None;
    }
    let dims = usize::try_from(found.ndim).ok()?;
    // SAFETY: it has `ndim` elements, which live as long as the object.
    let shape = if dims == 0 { &[] } else { unsafe { std::slice::from_raw_parts(found.shape, dims) } };
    let mut count = 1usize;
    for dim in (0..dims).rev() {
        let length = usize::try_from(shape[dim]).ok()?;
        // SAFETY: as of the shape.
        let stride = if found.strides.is_null() { None } else { Some(unsafe { *found.strides.add(dim) }) };
        if length != 1 && stride.is_some_and(|stride| usize::try_from(stride) != Ok(count)) {
            return None;
        }
        count = count.checked_mul(length)?;
    }
    if count == 0 {
        return None;
    }
    let dtype = match (found.dtype.code, found.dtype.bits) {
        (INT, 8) => DType::I8,
        (UINT, 8) => DType::U8,
        (FLOAT, 16) => DType::F16,
        (BFLOAT, 16) => DType::Bf16,
        (FLOAT, 32) => DType::F32,
        (FLOAT, 64) => DType::F64,
        _ => return None,
    };
    let address = (found.data as usize).checked_add(usize::try_from(found.byte_offset).ok()?)?;
    Some(Tensor { address, count, dtype, shape })
}
