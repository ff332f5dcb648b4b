//! AMX in plain Rust, so that what is around it is tested on every machine.

use std::cell::RefCell;

use half::bf16;

use crate::gemm::blocked::kernel::{Decoder, Kernel, Rows, STEP, Sums, decode};
use crate::gemm::direct::tiles::{DecodesGroups, Group, ROWS, STEPS, values_at};
use crate::gemm::tiles::{ByteTiles, SIDE, Tiles};
use crate::gemm::weight::Run;

pub(in crate::gemm) struct Emulated;

/// Pairs of bfloat16, one by one.
pub(in crate::gemm) struct Pairs;

impl Decoder for Pairs {
    type Value = bf16;
    type Codebook = [f32; 16];
    type Table = [bf16; 16];

    unsafe fn codebook(values: &[f32; 16]) -> [f32; 16] {
        *values
    }

    unsafe fn table(codebook: [f32; 16], scale: f32) -> [bf16; 16] {
        codebook.map(|v| bf16::from_f32(v * scale))
    }

    unsafe fn look_up(table: [bf16; 16], codes: *const u8, out: *mut bf16) {
        for i in 0..STEP / 2 {
            // SAFETY: the caller's.
            unsafe {
                let byte = *codes.add(i);
                out.add(2 * i).write_unaligned(table[usize::from(byte >> 4)]);
                out.add(2 * i + 1).write_unaligned(table[usize::from(byte & 15)]);
            }
        }
    }
}

impl DecodesGroups for Pairs {
    unsafe fn decode_group(group: &Group<'_>) {
        for row in 0..group.rows {
            // SAFETY: the caller's.
            unsafe {
                let [first, second] = group.scales_of(row);
                let tables = [first, second].map(|scale| group.values.map(|v| bf16::from_f32(v * scale)));
                let value = |at: usize| {
                    let byte = if at < 64 || group.whole { *group.codes_of(row).add(at / 2) } else { 0 };
                    let code = if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
                    u32::from(tables[at / 64][usize::from(code)].to_bits())
                };
                for i in 0..STEPS * SIDE {
                    let [low, high] = values_at(i / SIDE, i % SIDE).map(value);
                    *group.out.add((i / SIDE * ROWS + row) * SIDE + i % SIDE) = low | high << 16;
                }
            }
        }
    }
}

fn halves(word: u32) -> [f32; 2] {
    [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)]
}

impl Kernel for Pairs {
    const DEPTH: usize = 2;
    const LANES: usize = 32;
    const ROWS: usize = 1;
    const ROW_STEP: usize = 1;

    type Session = ();

    unsafe fn session() {}

    unsafe fn product(_: usize, _: *const u32, _: Rows, _: Sums) {
        unreachable!("tiles make the products");
    }

    unsafe fn decode(run: &Run<'_>, out: *mut u8) {
        // SAFETY: the caller's.
        unsafe { decode::<Self>(run, out.cast()) }
    }

    unsafe fn dot(words: usize, a: *const u32, b: *const u32) -> f32 {
        let of = |p: usize| {
            // SAFETY: the caller's.
            let (a, b) = unsafe { (halves(*a.add(p)), halves(*b.add(p))) };
            a[0] * b[0] + a[1] * b[1]
        };
        (0..words).map(of).sum()
    }

    unsafe fn decode_pair(first: &Run<'_>, second: &Run<'_>, out: *mut u32, stride: usize) -> bool {
        let mut decoded = [first, second].map(|run| vec![0u32; run.len.div_ceil(2)]);
        for (run, decoded) in [first, second].into_iter().zip(&mut decoded) {
            // SAFETY: there is room for the run.
            unsafe { Self::decode(run, decoded.as_mut_ptr().cast()) }
        }
        let [first, second] = decoded;
        for (panel, (first, second)) in first.chunks(16).zip(second.chunks(16)).enumerate() {
            // SAFETY: the caller's.
            unsafe { Self::weave(first, second, std::slice::from_raw_parts_mut(out.add(panel * stride), 32)) }
        }
        true
    }

    unsafe fn weave(first: &[u32], second: &[u32], out: &mut [u32]) {
        let both = first.iter().zip(second);
        let pairs = both.flat_map(|(a, b)| [a & 0xffff | b << 16, a >> 16 | b & 0xffff_0000]);
        out.iter_mut().zip(pairs).for_each(|(out, pair)| *out = pair);
    }
}

type Tile = [[u32; SIDE]; SIDE];

thread_local!(static TILES: RefCell<Option<[Tile; 8]>> = const { RefCell::new(None) });

fn with<R>(work: impl FnOnce(&mut [Tile; 8]) -> R) -> R {
    TILES.with_borrow_mut(|tiles| work(tiles.as_mut().expect("no session")))
}

pub(in crate::gemm) struct Session(());

impl Drop for Session {
    fn drop(&mut self) {
        TILES.set(None);
    }
}

impl Tiles for Emulated {
    type Session = Session;

    unsafe fn session() -> Session {
        // Nobody may rely on what was there before.
        TILES.set(Some([[[0x7fc0_7fc0; SIDE]; SIDE]; 8]));
        Session(())
    }

    unsafe fn zero<const TILE: usize>() {
        with(|tiles| tiles[TILE] = [[0; SIDE]; SIDE]);
    }

    unsafe fn load<const TILE: usize>(from: *const u32, stride: usize) {
        // SAFETY: the caller's.
        with(|tiles| {
            for (i, row) in tiles[TILE].iter_mut().enumerate() {
                *row = unsafe { from.add(i * stride).cast::<[u32; SIDE]>().read_unaligned() };
            }
        });
    }

    unsafe fn store<const TILE: usize>(to: *mut f32, stride: usize) {
        with(|tiles| {
            for (i, row) in tiles[TILE].iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { to.add(i * stride).cast::<[u32; SIDE]>().write_unaligned(*row) };
            }
        });
    }

    unsafe fn multiply<const SUMS: usize, const A: usize, const B: usize>() {
        with(|tiles| {
            let (a, b) = (tiles[A], tiles[B]);
            for (sums, a) in tiles[SUMS].iter_mut().zip(a) {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    let mut total = f32::from_bits(*sum);
                    for (a, b) in a.iter().zip(&b) {
                        let ([a0, a1], [b0, b1]) = (halves(*a), halves(b[lane]));
                        total += a0 * b0;
                        total += a1 * b1;
                    }
                    *sum = total.to_bits();
                }
            }
        });
    }
}

impl ByteTiles for Emulated {
    unsafe fn multiply_bytes<const SUMS: usize, const A: usize, const B: usize>() {
        with(|tiles| {
            let (a, b) = (tiles[A], tiles[B]);
            for (sums, a) in tiles[SUMS].iter_mut().zip(a) {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    for (a, b) in a.iter().zip(&b) {
                        for (a, b) in a.to_le_bytes().into_iter().zip(b[lane].to_le_bytes()) {
                            let product = i32::from(a as i8) * i32::from(b as i8);
                            *sum = sum.wrapping_add_signed(product);
                        }
                    }
                }
            }
        });
    }
}
