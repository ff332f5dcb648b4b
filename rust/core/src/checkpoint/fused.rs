//! Tensors that hold the matrices of all experts of a layer (Mixture-of-Experts), taken apart and put together.
//!
//! A quantized checkpoint has a weight for each matrix of each expert, under the names that loaders read:
//! `experts.3.up_proj.weight`. Some sources have one tensor for all: `experts.gate_up_proj`, of `[experts, out, in]` or
//! `[experts, in, out]`, the rows of gate and up projection one after the other or alternating; gpt-oss has it in MXFP4
//! too. Its parts are then matrices that lie in the tensor in some order, and nothing is copied to reach them.

use std::collections::{BTreeMap, HashMap, HashSet};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::dtype::is_float;
use super::matrix::{MXFP4_GROUP, Matrix, Part};
use super::reader::{Checkpoint, TensorRef};
use super::selection::{Experts, Projections, experts_of, merges_experts, split_expert};
use crate::error::{Error, Result};

/// The entry of `__metadata__` that says which weights were parts of which tensors.
pub const FUSED_KEY: &str = "halfbyte.fused_experts";

/// Ends of the names of tensors that hold all experts: what is behind the path of the module, whether the module is
/// called `experts` there (else it is inside the one that is), and whether it holds the down projections.
const ENDS: &[(&str, bool, bool)] = &[
    (".experts.gate_up_proj", true, false),
    (".experts.up_proj", true, false),
    (".experts.down_proj", true, true),
    (".experts.gate_up_proj.weight", true, false),
    (".experts.down_proj.weight", true, true),
    (".experts.fc1.weight", true, false),
    (".experts.fc2.weight", true, true),
    (".input_linear.weight", false, false),
    (".output_linear.weight", false, true),
];

/// How a tensor holds the matrices of its experts: enough to put it together again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fusion {
    /// Path of the module, which its experts are below.
    pub experts: String,
    /// Names of the projections, in order.
    pub projections: Vec<String>,
    /// The tensor's shape.
    pub shape: [usize; 3],
    /// Each expert is `[in, out]`.
    pub transposed: bool,
    /// Rows of the projections alternate.
    pub interleaved: bool,
}

impl Fusion {
    /// Rows of one projection, and columns.
    pub fn matrix_shape(&self) -> [usize; 2] {
        let [_, first, second] = self.shape;
        let (rows, columns) = if self.transposed { (second, first) } else { (first, second) };
        [rows / self.projections.len().max(1), columns]
    }

    /// The name of the weight of one matrix.
    pub fn name(&self, expert: usize, projection: usize) -> String {
        format!("{}.{expert}.{}.weight", self.experts, self.projections[projection])
    }

    /// Where the values of one matrix lie.
    pub fn part(&self, expert: usize, projection: usize) -> Part {
        let [rows, columns] = self.matrix_shape();
        let count = self.projections.len();
        let (row, column) = if self.transposed { (1, rows * count) } else { (columns, 1) };
        let (begin, row_step) =
            if self.interleaved { (projection * row, row * count) } else { (projection * rows * row, row) };
        Part { first: expert * rows * columns * count + begin, row_step, column_step: column, scales: None }
    }

    /// Whether the description fits itself: what a file says is not to be trusted.
    pub fn is_sound(&self) -> bool {
        let [experts, ..] = self.shape;
        let [rows, columns] = self.matrix_shape();
        let count = self.projections.len();
        let all = [experts, rows, columns, count].iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let out = if self.transposed { self.shape[2] } else { self.shape[1] };
        (1..=2).contains(&count)
            && self.projections.first() != self.projections.get(1)
            && out % count == 0
            && all.is_some_and(|n| n > 0 && n < 1 << 59)
    }
}

/// One matrix of a tensor that holds many.
#[derive(Debug, Clone)]
pub struct FusedPart {
    /// The name of its weight.
    pub name: String,
    /// Its shape, `[out, in]`.
    pub shape: [usize; 2],
    /// Where it lies.
    pub matrix: Matrix,
}

/// A tensor that holds the matrices of all experts.
#[derive(Debug, Clone)]
pub struct FusedTensor {
    /// Its name, or for MXFP4 that of the dense tensor that transformers makes of it.
    pub name: String,
    /// How it holds them.
    pub fusion: Fusion,
    /// Whether it holds MXFP4 codes.
    pub mxfp4: bool,
    /// Its matrices: all of the first expert, then of the next.
    pub parts: Vec<FusedPart>,
}

/// The tensors of a checkpoint that hold many experts each.
#[derive(Debug, Default)]
pub struct FusedExperts {
    /// By tensor.
    pub tensors: BTreeMap<TensorRef, FusedTensor>,
    /// Scales that belong to the codes of one.
    pub scales: HashSet<TensorRef>,
    /// A loader reads single matrices only.
    pub single: bool,
}

/// What is found of one module.
#[derive(Default)]
struct Pair {
    up: Option<(TensorRef, String)>,
    down: Option<(TensorRef, String)>,
    /// A tensor with the name of one of them, but another dtype or number of dimensions.
    odd: Option<TensorRef>,
}

impl FusedExperts {
    /// Finds the tensors that can be taken apart so that a loader reads the parts.
    ///
    /// # Errors
    /// The architecture has such experts, and the tensors are not what it has: one is missing, or shapes do not fit.
    pub fn find(source: &Checkpoint, config: Option<&Value>) -> Result<Self> {
        let Experts::Named(names) = experts_of(config) else { return Ok(Self::default()) };
        let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
        for &at in &source.order {
            let entry = source.tensor(at);
            let (name, fits) = match entry.name.strip_suffix("_blocks") {
                Some(name) if entry.dtype == Dtype::U8 && entry.shape.len() == 4 => (name, true),
                _ => (&*entry.name, entry.shape.len() == 3 && is_float(entry.dtype)),
            };
            let found = ENDS.iter().find_map(|(end, inside, down)| Some((name.strip_suffix(end)?, inside, *down)));
            let Some((path, _, down)) = found.filter(|(_, named, _)| **named || source_has_router(source, name)) else {
                continue;
            };
            let pair = pairs.entry(format!("{path}.experts")).or_default();
            if !fits {
                pair.odd = pair.odd.or(Some(at));
                continue;
            }
            let slot = if down { &mut pair.down } else { &mut pair.up };
            if let Some((other, _)) = slot {
                return Err(Error::tensor(
                    &source.file(at).path,
                    &entry.name,
                    format!("holds the same experts as {:?}: expected one of them", source.tensor(*other).name),
                ));
            }
            *slot = Some((at, name.to_owned()));
        }
        let mut found = Self { single: names.single, ..Self::default() };
        for (path, pair) in pairs {
            found.add(source, names, path, pair)?;
        }
        Ok(found)
    }

    fn add(&mut self, source: &Checkpoint, names: &Projections, path: String, pair: Pair) -> Result<()> {
        let (up, down) = match (pair.up, pair.down) {
            (Some(up), Some(down)) => (up, down),
            // A file of several may hold one of them.
            (Some(one), None) | (None, Some(one)) if !source.whole => {
                return Err(Error::tensor(
                    &source.file(one.0).path,
                    &source.tensor(one.0).name,
                    "holds one half of fused experts, and this file not the other: name the folder of the checkpoint",
                ));
            }
            (Some(one), None) | (None, Some(one)) => {
                if let Some(odd) = pair.odd {
                    let entry = source.tensor(odd);
                    return Err(Error::tensor(
                        &source.file(odd).path,
                        &entry.name,
                        format!(
                            "is {} of shape {:?}, and belongs to the experts of {:?}: expected F16, BF16 or F32 of three \
                             dimensions",
                            entry.dtype,
                            entry.shape,
                            source.tensor(one.0).name
                        ),
                    ));
                }
                return Err(Error::tensor(
                    &source.file(one.0).path,
                    &source.tensor(one.0).name,
                    format!(
                        "is here, but the {} projections of {path} are not: expected both",
                        if one.1.contains("down") || one.1.contains("output") { "up" } else { "down" }
                    ),
                ));
            }
            (None, None) => return Ok(()),
        };
        let (up_shape, up_scales) = logical_shape(source, up.0)?;
        let (down_shape, down_scales) = logical_shape(source, down.0)?;
        let gated = names.gate.is_some();
        let count = 1 + usize::from(gated);
        let fits = |transposed: bool| {
            let [experts, a, b] = up_shape;
            let [others, c, d] = down_shape;
            let ((out, columns), (width, inner)) = if transposed { ((b, a), (d, c)) } else { ((a, b), (c, d)) };
            experts == others && out == count * inner && columns == width && experts * out * columns > 0
        };
        // At most one of them: the one has twice as many rows as the other columns, or (without gates) they are alike
        // only where nobody could tell.
        let transposed = match (fits(false), fits(true)) {
            (false, true) => true,
            (true, false) => false,
            (true, true) if !gated => false,
            _ => {
                return Err(Error::tensor(
                    &source.file(up.0).path,
                    &source.tensor(up.0).name,
                    format!(
                        "has the shape {up_shape:?}, which does not fit {down_shape:?} of {:?}: expected \
                         [experts, {} × inner, width] and [experts, width, inner], or both transposed",
                        source.tensor(down.0).name,
                        count
                    ),
                ));
            }
        };
        let wide: Vec<String> = names.gate.iter().chain([&names.up]).map(|name| (*name).to_owned()).collect();
        for ((at, name), shape, scales, projections, interleaved) in [
            (up, up_shape, up_scales, wide, names.interleaved && gated),
            (down, down_shape, down_scales, vec![names.down.to_owned()], false),
        ] {
            let mxfp4 = scales.is_some();
            let fusion = Fusion { experts: path.clone(), projections, shape, transposed, interleaved };
            let dtype = if mxfp4 { Dtype::BF16 } else { source.tensor(at).dtype };
            let [rows, columns] = fusion.matrix_shape();
            let mut parts = Vec::with_capacity(shape[0] * fusion.projections.len());
            for expert in 0..shape[0] {
                for projection in 0..fusion.projections.len() {
                    let part = Part { scales, ..fusion.part(expert, projection) };
                    parts.push(FusedPart {
                        name: fusion.name(expert, projection),
                        shape: [rows, columns],
                        matrix: Matrix { at, dtype, rows, columns, part: Some(part) },
                    });
                }
            }
            // transformers has what it decodes in the other order.
            let fusion = if mxfp4 {
                let [experts, rows, columns] = fusion.shape;
                Fusion { shape: [experts, columns, rows], transposed: true, ..fusion }
            } else {
                fusion
            };
            self.scales.extend(scales);
            self.tensors.insert(at, FusedTensor { name, fusion, mxfp4, parts });
        }
        Ok(())
    }

    /// Every matrix by the name of its weight.
    pub fn by_name(&self) -> HashMap<&str, &FusedPart> {
        self.tensors.values().flat_map(|tensor| &tensor.parts).map(|part| (part.name.as_str(), part)).collect()
    }
}

/// Whether the module of a tensor that is not below `experts` has a router beside it: then its layers are experts.
fn source_has_router(source: &Checkpoint, name: &str) -> bool {
    let parent = name.rsplit_once('.').and_then(|(module, _)| module.rsplit_once('.')).map_or("", |(parent, _)| parent);
    ["router.layer.weight", "router.weight"].iter().any(|router| source.find(&format!("{parent}.{router}")).is_some())
}

/// The shape of the dense tensor, and the scales of one in MXFP4.
fn logical_shape(source: &Checkpoint, at: TensorRef) -> Result<([usize; 3], Option<TensorRef>)> {
    let entry = source.tensor(at);
    if let Ok(shape) = <[usize; 3]>::try_from(&entry.shape[..]) {
        return Ok((shape, None));
    }
    let fail = |problem: String| Error::tensor(&source.file(at).path, &entry.name, problem);
    let name = format!("{}_scales", entry.name.trim_end_matches("_blocks"));
    let scales = source.find(&name).ok_or_else(|| fail(format!("holds MXFP4 codes, and {name:?} is missing")))?;
    let &[experts, rows, groups, bytes] = &entry.shape[..] else {
        return Err(fail(format!("has the shape {:?}: expected [experts, out, in / 32, 16]", entry.shape)));
    };
    let beside = source.tensor(scales);
    let e8m0 = matches!(beside.dtype, Dtype::U8 | Dtype::F8_E8M0);
    if bytes != MXFP4_GROUP / 2 || beside.shape != [experts, rows, groups] || !e8m0 {
        return Err(fail(format!(
            "has the shape {:?}, and its scales are {} {:?}: expected [experts, out, in / 32, 16] beside uint8 of \
             [experts, out, in / 32]",
            entry.shape, beside.dtype, beside.shape
        )));
    }
    Ok(([experts, rows, groups * MXFP4_GROUP], Some(scales)))
}

/// What to say of quantized weights of experts that come back under names which transformers reads from quantized
/// checkpoints only; nothing where there are none. `names` are those of weights that nothing puts together.
pub fn unread_note<'n>(config: Option<&Value>, names: impl Iterator<Item = &'n str>) -> Option<String> {
    let single = matches!(experts_of(config), Experts::Named(_)) && !merges_experts(config);
    let mut unread = names.filter(|name| is_listed(name) || (single && split_expert(name).is_some()));
    let first = unread.next()?;
    Some(format!(
        "{} weights of experts keep names that transformers does not read from a 16-bit checkpoint of this architecture, \
         such as {first}: for one that it reads, load the quantized checkpoint, and save what model.dequantize() gives",
        1 + unread.count()
    ))
}

/// Whether a name is that of one expert in a list of each projection, as Unsloth has gpt-oss: no 16-bit checkpoint has it.
fn is_listed(name: &str) -> bool {
    let lists = [".gate_up_projs.", ".up_projs.", ".down_projs."];
    let number = lists.iter().find_map(|list| name.split_once(list)?.1.strip_suffix(".weight"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// The tensors that weights of a quantized checkpoint were parts of, as the checkpoint says itself.
pub fn recorded(source: &Checkpoint) -> BTreeMap<String, Fusion> {
    let mut all = BTreeMap::new();
    for file in &source.files {
        let text = file.metadata.get(FUSED_KEY);
        let found = text.and_then(|text| serde_json::from_str::<BTreeMap<String, Fusion>>(text).ok());
        all.extend(found.into_iter().flatten().filter(|(_, fusion)| fusion.is_sound()));
    }
    all
}
