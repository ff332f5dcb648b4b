//! C functions under bitsandbytes' names, with its arguments, for code that calls these by address (unsloth, axolotl).
//!
//! Pointers are to memory of a GPU, where the kernel is put on the stream that is given, or of the processor, where the
//! call computes: the driver is asked which. Each function gives 0, or 1 when it did nothing; what was wrong is then in
//! `halfbyte_last_error`. Callers that take the functions for `void` ones, as bitsandbytes' are, see no difference.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use half::{bf16, f16};
use halfbyte::codebook::QuantType;
use halfbyte::dtype::{DType, Element};
use halfbyte::error::{Error, Result};
use halfbyte::geometry::{BlockSize, packed_len, strided_lengths};
use halfbyte::quant::blockwise4;
use halfbyte::quant::blockwise8::{self, ByteMap};
#[cfg(feature = "cuda")]
use halfbyte_cuda::{self as cuda, Device, Gemv, Memory, Scales, Stream, Variant, driver};

use super::buffer::{Buffer, Plain, check_disjoint};
use super::quant::in_parallel;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Why the last function that this thread called gave 1: UTF-8 that stays until the next call.
#[unsafe(no_mangle)]
extern "C" fn halfbyte_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|words| words.as_ptr())
}

/// No panic may leave a C function.
fn status(work: impl FnOnce() -> Result<()>) -> c_int {
    let done = catch_unwind(AssertUnwindSafe(work));
    let done = done.unwrap_or_else(|_| Err(Error::Bug { words: "a C function panicked".to_owned() }));
    let Err(error) = done else {
        return 0;
    };
    let words = error.to_string().replace('\0', "");
    LAST_ERROR.with_borrow_mut(|last| *last = CString::new(words).unwrap_or_default());
    1
}

/// A number of a C caller's.
fn size(argument: &'static str, value: c_int) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::argument(argument, value, "0 or more"))
}

/// The device of this memory, or `None` for the processor.
#[cfg(feature = "cuda")]
fn device_of(address: usize) -> Result<Option<&'static Device>> {
    driver::device_of(address)?.map(Device::get).transpose()
}

/// A C type of values.
trait Value: Element + Plain {}

impl<T: Element + Plain> Value for T {}

/// What is read and written blockwise: the addresses as a C caller gives them.
struct Blocks {
    /// 256 values of codes of 8 bits; of no meaning for 4 bits.
    code: usize,
    codes: usize,
    absmax: usize,
    values: usize,
    blocksize: usize,
    n: usize,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "there is no stream"))]
    stream: usize,
}

impl Blocks {
    fn new(
        code: *const c_void,
        codes: *const c_void,
        absmax: *const c_void,
        values: *const c_void,
        blocksize: c_int,
        n: c_int,
        stream: *mut c_void,
    ) -> Result<Self> {
        let (blocksize, n) = (size("blocksize", blocksize)?, size("n", n)?);
        if blocksize == 0 {
            return Err(Error::argument("blocksize", 0, "1 or more"));
        }
        let [code, codes, absmax, values] = [code, codes, absmax, values].map(<*const c_void>::expose_provenance);
        Ok(Self { code, codes, absmax, values, blocksize, n, stream: stream.expose_provenance() })
    }

    fn scales(&self) -> usize {
        self.n.div_ceil(self.blocksize)
    }

    /// Codes, scales and values in memory of the processor, `count` bytes of codes.
    fn host<T: Value>(&self, count: usize) -> Result<[Buffer; 3]> {
        Ok([
            Buffer::of("A", self.codes, count, DType::U8)?,
            Buffer::of("absmax", self.absmax, self.scales(), DType::F32)?,
            Buffer::of("out", self.values, self.n, <T as Plain>::DTYPE)?,
        ])
    }

    /// The same in memory of a GPU.
    #[cfg(feature = "cuda")]
    fn device<T: Value>(&self, count: usize) -> Result<[Memory; 3]> {
        Ok([
            Memory::new("A", self.codes, count, DType::U8)?,
            Memory::new("absmax", self.absmax, self.scales(), DType::F32)?,
            Memory::new("out", self.values, self.n, <T as Plain>::DTYPE)?,
        ])
    }

    fn map(&self) -> Result<[f32; 256]> {
        let code = Buffer::of("code", self.code, 256, DType::F32)?;
        // SAFETY: the C caller's to keep for the call.
        let values = unsafe { code.slice::<f32>() }?;
        let mut map = [0.0; 256];
        map.copy_from_slice(values);
        Ok(map)
    }

    fn dequantize_4bit<T: Value>(&self, quant_type: QuantType) -> Result<()> {
        let blocksize = BlockSize::new(self.blocksize)?;
        #[cfg(feature = "cuda")]
        if let Some(device) = device_of(self.values)? {
            let [packed, absmax, out] = self.device::<T>(packed_len(self.n))?;
            let stream = Stream(self.stream);
            // SAFETY: the C caller's to keep.
            return unsafe {
                let scales = Scales::Plain(absmax);
                cuda::dequantize(device, stream, &packed, &scales, &out, quant_type, blocksize, Variant::Fast)
            };
        }
        let [packed, absmax, out] = self.host::<T>(packed_len(self.n))?;
        check_disjoint(&[&packed, &absmax], &[&out])?;
        // SAFETY: disjoint, and the C caller's to keep for the call.
        let (packed, absmax, out) = unsafe { (packed.slice()?, absmax.slice()?, out.slice_mut::<T>()?) };
        in_parallel(out.len(), blockwise4::TASK, || blockwise4::dequantize(packed, absmax, quant_type, blocksize, out))
    }

    fn quantize_4bit<T: Value>(&self, quant_type: QuantType) -> Result<()> {
        let blocksize = BlockSize::new(self.blocksize)?;
        #[cfg(feature = "cuda")]
        if let Some(device) = device_of(self.values)? {
            let [packed, absmax, input] = self.device::<T>(packed_len(self.n))?;
            let stream = Stream(self.stream);
            // SAFETY: the C caller's to keep.
            return unsafe {
                cuda::quantize(device, stream, &input, &packed, &absmax, quant_type, blocksize, Variant::Fast)
            };
        }
        let [packed, absmax, input] = self.host::<T>(packed_len(self.n))?;
        check_disjoint(&[&input], &[&packed, &absmax])?;
        // SAFETY: disjoint, and the C caller's to keep for the call.
        let (packed, absmax, input) = unsafe { (packed.slice_mut()?, absmax.slice_mut()?, input.slice::<T>()?) };
        in_parallel(input.len(), blockwise4::TASK, || {
            blockwise4::quantize(input, quant_type, blocksize, packed, absmax)
        })
        .map(|_| ())
    }

    fn dequantize_8bit<T: Value>(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(device) = device_of(self.values)? {
            let [codes, absmax, out] = self.device::<T>(self.n)?;
            let code = Memory::new("code", self.code, 256, DType::F32)?;
            let (stream, blocksize) = (Stream(self.stream), self.blocksize);
            // SAFETY: the C caller's to keep.
            return unsafe {
                cuda::dequantize_8bit(device, stream, &codes, &absmax, &code, &out, blocksize, Variant::Fast)
            };
        }
        let [codes, absmax, out] = self.host::<T>(self.n)?;
        check_disjoint(&[&codes, &absmax], &[&out])?;
        let map = self.map()?;
        // SAFETY: disjoint, and the C caller's to keep for the call.
        let (codes, absmax, out) = unsafe { (codes.slice::<u8>()?, absmax.slice::<f32>()?, out.slice_mut::<T>()?) };
        for ((out, codes), scale) in out.chunks_mut(self.blocksize).zip(codes.chunks(self.blocksize)).zip(absmax) {
            for (value, &code) in out.iter_mut().zip(codes) {
                *value = T::from_f32(map[usize::from(code)] * scale);
            }
        }
        Ok(())
    }

    fn quantize_8bit<T: Value>(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(device) = device_of(self.values)? {
            let [codes, absmax, input] = self.device::<T>(self.n)?;
            let code = Memory::new("code", self.code, 256, DType::F32)?;
            let (stream, blocksize) = (Stream(self.stream), self.blocksize);
            // SAFETY: the C caller's to keep.
            return unsafe {
                cuda::quantize_8bit(device, stream, &input, &code, &codes, &absmax, blocksize, Variant::Fast)
            };
        }
        let blocksize = BlockSize::new(self.blocksize)?;
        let [codes, absmax, input] = self.host::<T>(self.n)?;
        check_disjoint(&[&input], &[&codes, &absmax])?;
        let map = ByteMap::new(&self.map()?)?;
        // SAFETY: disjoint, and the C caller's to keep for the call.
        let (codes, absmax, input) = unsafe { (codes.slice_mut()?, absmax.slice_mut()?, input.slice::<T>()?) };
        let wide: Vec<f32> = input.iter().map(|value| value.to_f32()).collect();
        in_parallel(input.len(), blockwise8::TASK, || blockwise8::quantize_8bit(&wide, &map, blocksize, codes, absmax))
    }
}

/// `out[m] = B[m][k] · A[k]`, row `i` of `B` beginning `i * stride` bytes on; addresses as a C caller gives them.
struct Vector {
    m: usize,
    k: usize,
    a: usize,
    b: usize,
    absmax: usize,
    table: usize,
    out: usize,
    stride: usize,
    blocksize: BlockSize,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "there is no stream"))]
    stream: usize,
}

impl Vector {
    fn product<T: Value>(&self) -> Result<()> {
        let (bytes, scales) = strided_lengths(self.m, self.k, self.stride, self.blocksize)?;
        #[cfg(feature = "cuda")]
        if let Some(device) = device_of(self.out)? {
            let gemv = Gemv {
                x: &Memory::new("A", self.a, self.k, <T as Plain>::DTYPE)?,
                packed: &Memory::new("B", self.b, bytes, DType::U8)?,
                absmax: &Memory::new("absmax", self.absmax, scales, DType::F32)?,
                table: &Memory::new("datatype", self.table, 16, DType::F32)?,
                y: &Memory::new("out", self.out, self.m, <T as Plain>::DTYPE)?,
                stride: self.stride,
                blocksize: self.blocksize,
            };
            // SAFETY: the C caller's to keep.
            return unsafe { cuda::gemv(device, Stream(self.stream), &gemv) };
        }
        let x = Buffer::of("A", self.a, self.k, <T as Plain>::DTYPE)?;
        let packed = Buffer::of("B", self.b, bytes, DType::U8)?;
        let absmax = Buffer::of("absmax", self.absmax, scales, DType::F32)?;
        let table = Buffer::of("datatype", self.table, 16, DType::F32)?;
        let out = Buffer::of("out", self.out, self.m, <T as Plain>::DTYPE)?;
        check_disjoint(&[&x, &packed, &absmax, &table], &[&out])?;
        // SAFETY: disjoint, and the C caller's to keep for the call.
        let (x, packed, absmax, table, out) = unsafe {
            (x.slice::<T>()?, packed.slice::<u8>()?, absmax.slice::<f32>()?, table.slice::<f32>()?, out.slice_mut()?)
        };
        for (row, y) in out.iter_mut().enumerate() {
            let (bytes, first) = (&packed[row * self.stride..], row * self.stride * 2);
            let term = |(i, x): (usize, &T)| {
                let code = if i % 2 == 0 { bytes[i / 2] >> 4 } else { bytes[i / 2] & 15 };
                x.to_f32() * (table[usize::from(code)] * absmax[(first + i) / self.blocksize.get()])
            };
            *y = T::from_f32(x.iter().enumerate().map(term).sum());
        }
        Ok(())
    }
}

/// `f(code, A, absmax, out, blocksize, n, stream)`.
macro_rules! dequantize {
    ($($name:ident: $type:ty $(, $quant_type:ident)?;)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(
            code: *const c_void,
            a: *const c_void,
            absmax: *const c_void,
            out: *mut c_void,
            blocksize: c_int,
            n: c_int,
            stream: *mut c_void,
        ) -> c_int {
            status(|| {
                let blocks = Blocks::new(code, a, absmax, out, blocksize, n, stream)?;
                dequantize!(@ blocks, $type $(, $quant_type)?)
            })
        }
    )*};
    (@ $blocks:ident, $type:ty) => { $blocks.dequantize_8bit::<$type>() };
    (@ $blocks:ident, $type:ty, $quant_type:ident) => { $blocks.dequantize_4bit::<$type>(QuantType::$quant_type) };
}

dequantize! {
    cdequantize_blockwise_fp32: f32;
    cdequantize_blockwise_fp16: f16;
    cdequantize_blockwise_bf16: bf16;
    cdequantize_blockwise_fp32_nf4: f32, Nf4;
    cdequantize_blockwise_fp16_nf4: f16, Nf4;
    cdequantize_blockwise_bf16_nf4: bf16, Nf4;
    cdequantize_blockwise_fp32_fp4: f32, Fp4;
    cdequantize_blockwise_fp16_fp4: f16, Fp4;
    cdequantize_blockwise_bf16_fp4: bf16, Fp4;
}

/// `f(code, A, absmax, out, blocksize, n)`, on the legacy default stream.
macro_rules! quantize {
    ($($name:ident: $type:ty $(, $quant_type:ident)?;)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(
            code: *const c_void,
            a: *const c_void,
            absmax: *mut c_void,
            out: *mut c_void,
            blocksize: c_int,
            n: c_int,
        ) -> c_int {
            status(|| {
                let blocks = Blocks::new(code, out, absmax, a, blocksize, n, std::ptr::null_mut())?;
                quantize!(@ blocks, $type $(, $quant_type)?)
            })
        }
    )*};
    (@ $blocks:ident, $type:ty) => { $blocks.quantize_8bit::<$type>() };
    (@ $blocks:ident, $type:ty, $quant_type:ident) => { $blocks.quantize_4bit::<$type>(QuantType::$quant_type) };
}

quantize! {
    cquantize_blockwise_fp32: f32;
    cquantize_blockwise_fp16: f16;
    cquantize_blockwise_bf16: bf16;
    cquantize_blockwise_fp32_nf4: f32, Nf4;
    cquantize_blockwise_fp16_nf4: f16, Nf4;
    cquantize_blockwise_bf16_nf4: bf16, Nf4;
    cquantize_blockwise_fp32_fp4: f32, Fp4;
    cquantize_blockwise_fp16_fp4: f16, Fp4;
    cquantize_blockwise_bf16_fp4: bf16, Fp4;
}

/// `f(m, n, k, A, B, absmax, datatype, out, lda, ldb, ldc, blocksize, stream)`; `n` is 1, and `lda` and `ldc` mean nothing.
macro_rules! product {
    ($($name:ident: $type:ty;)*) => {$(
        #[unsafe(no_mangle)]
        #[allow(clippy::too_many_arguments, reason = "bitsandbytes'")]
        extern "C" fn $name(
            m: c_int,
            n: c_int,
            k: c_int,
            a: *const c_void,
            b: *const c_void,
            absmax: *const c_void,
            datatype: *const c_void,
            out: *mut c_void,
            _lda: c_int,
            ldb: c_int,
            _ldc: c_int,
            blocksize: c_int,
            stream: *mut c_void,
        ) -> c_int {
            status(|| {
                if n != 1 {
                    return Err(Error::argument("n", n, "1 (the product is of one vector)"));
                }
                let vector = Vector {
                    m: size("m", m)?,
                    k: size("k", k)?,
                    a: a.expose_provenance(),
                    b: b.expose_provenance(),
                    absmax: absmax.expose_provenance(),
                    table: datatype.expose_provenance(),
                    out: out.expose_provenance(),
                    stride: size("ldb", ldb)?,
                    blocksize: BlockSize::new(size("blocksize", blocksize)?)?,
                    stream: stream.expose_provenance(),
                };
                vector.product::<$type>()
            })
        }
    )*};
}

product! {
    cgemm_4bit_inference_naive_fp32: f32;
    cgemm_4bit_inference_naive_fp16: f16;
    cgemm_4bit_inference_naive_bf16: bf16;
}
