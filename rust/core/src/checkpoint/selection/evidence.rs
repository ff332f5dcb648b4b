//! What the headers of a checkpoint show of its layers, whoever wrote the model: biases tell how a weight lies, and the
//! sizes that `config.json` names tell tables and output layers.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::architectures::{OUTPUT_NAMES, is_token_table};
use super::facts::{TensorFacts, module_of};

/// How a two-dimensional weight lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[out, in]`, as `nn.Linear` has it.
    Linear,
    /// `[in, out]`, as `Conv1D` has it.
    Conv1d,
    /// The headers do not say.
    Unclear,
}

/// What the Python files beside a checkpoint show of its layers, where `config.json` names them as the model's code
/// (`auto_map`). They are searched for words, and never run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Code {
    /// There are none, or they belong to no code of the model's own.
    #[default]
    Unseen,
    /// They do not name a `Conv1D`.
    WithoutConv1d,
    /// They name transformers' `Conv1D`.
    Conv1d,
    /// They define a class of that name, which no loader packs.
    OwnConv1d,
}

impl Code {
    /// What these texts show.
    pub fn of(texts: impl IntoIterator<Item = String>) -> Self {
        let mut found = Self::Unseen;
        for text in texts {
            let one = match () {
                () if text.contains("class Conv1D") => Self::OwnConv1d,
                () if text.contains("Conv1D") => Self::Conv1d,
                () => Self::WithoutConv1d,
            };
            if one as u8 > found as u8 {
                found = one;
            }
        }
        found
    }
}

/// Names of GPT-2's `Conv1D` modules, which its descendants keep, whatever layer they make of them.
const CONV1D_NAMES: [&str; 4] = ["c_attn", "c_fc", "c_proj", "q_attn"];

/// Fields of `config.json` that hold the number of rows of a table.
const VOCABULARIES: [&str; 7] = [
    "vocab_size",
    "padded_vocab_size",
    "n_vocab",
    "text_vocab_size",
    "embedding_size",
    "num_embeddings",
    "output_vocab_size",
];
const POSITIONS: [&str; 7] = [
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "type_vocab_size",
];

/// Facts gathered once, before any tensor is judged.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// Lengths of biases, by module.
    biases: HashMap<String, usize>,
    /// For a module's last name: whether biases have shown a `Conv1D`, and whether they have shown an `nn.Linear`.
    votes: HashMap<String, (bool, bool)>,
    /// The same over the whole checkpoint.
    all: (bool, bool),
    /// Shapes of token tables, which are also those of output layers.
    tables: HashSet<(usize, usize)>,
    vocabularies: HashSet<usize>,
    positions: HashSet<usize>,
    code: Code,
}

impl Evidence {
    pub fn new(config: Option<&Value>, code: Code, tensors: &[TensorFacts<'_>]) -> Self {
        let mut found = Self { code, ..Self::default() };
        for tensor in tensors {
            if let (Some(module), [len]) = (tensor.name.strip_suffix(".bias"), tensor.shape) {
                found.biases.insert(module.to_owned(), *len);
            }
        }
        for tensor in tensors {
            let (Some(module), &[rows, columns]) = (tensor.name.strip_suffix(".weight"), tensor.shape) else {
                continue;
            };
            if is_token_table(module) && rows != columns {
                found.tables.insert((rows, columns));
            }
            if let Some(conv1d) = found.shown(module, rows, columns) {
                let vote = found.votes.entry(last(module).to_owned()).or_default();
                for seen in [vote, &mut found.all] {
                    *if conv1d { &mut seen.0 } else { &mut seen.1 } = true;
                }
            }
        }
        if let Some(config) = config {
            let sizes = |names: &[&str]| {
                let mut set = HashSet::new();
                collect(config, names, 0, &mut set);
                set
            };
            found.vocabularies = sizes(&VOCABULARIES);
            found.positions = sizes(&POSITIONS);
        }
        found
    }

    pub fn has_bias(&self, module: &str) -> bool {
        self.biases.contains_key(module)
    }

    /// What a bias beside a weight that is not square shows.
    fn shown(&self, module: &str, rows: usize, columns: usize) -> Option<bool> {
        let len = *self.biases.get(module)?;
        (rows != columns && (len == rows || len == columns)).then_some(len == columns)
    }

    /// How the weight of a module lies. `family`: the architecture, as far as the rules know it, has a `Conv1D` there;
    /// `certain`: the model is that architecture, and not somebody's code under its name.
    pub fn layout(&self, module: &str, shape: &[usize], family: bool, certain: bool) -> Layout {
        let known = |conv1d: bool| if conv1d { Layout::Conv1d } else { Layout::Linear };
        let &[rows, columns] = shape else { return known(family) };
        if let Some(conv1d) = self.shown(module, rows, columns) {
            // Of classes that the model's own code defines, loaders pack none.
            let packed = !conv1d || matches!(self.code, Code::Unseen | Code::Conv1d);
            return if packed { known(conv1d) } else { Layout::Unclear };
        }
        if certain {
            return known(family);
        }
        let named = family || CONV1D_NAMES.contains(&last(module));
        if !self.has_bias(module) {
            // A Conv1D always has one; what has GPT-2's place and none may be anything.
            return if family { Layout::Unclear } else { Layout::Linear };
        }
        match self.votes.get(last(module)).copied().unwrap_or_default() {
            (true, false) if self.code == Code::OwnConv1d => Layout::Unclear,
            (true, false) => Layout::Conv1d,
            (false, true) => Layout::Linear,
            _ => match self.all {
                (true, false) if named && self.code != Code::OwnConv1d => Layout::Conv1d,
                (true, _) => Layout::Unclear,
                _ if matches!(self.code, Code::Conv1d | Code::OwnConv1d) => Layout::Unclear,
                (false, true) if !family => Layout::Linear,
                (false, false) if !named => Layout::Linear,
                _ => Layout::Unclear,
            },
        }
    }

    /// Whether a weight of this shape may be a table, or an output layer, of a model that nobody knows.
    pub fn is_table(&self, module: &str, shape: &[usize]) -> bool {
        let &[rows, columns] = shape else { return false };
        let name = last(module);
        let outside = is_outside(module);
        let tall = self.vocabularies.contains(&rows) || self.tables.contains(&(rows, columns));
        tall && (outside || ["head", "output", "embed", "logit", "vocab"].iter().any(|part| name.contains(part)))
            || outside && OUTPUT_NAMES.contains(&name)
            || !self.has_bias(module) && (name.contains("emb") || outside && self.positions.contains(&rows))
    }
}

/// Whether a module lies outside all numbered lists of layers.
pub(super) fn is_outside(module: &str) -> bool {
    !module.split('.').any(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

/// The last part of a path that is no number.
fn last(module: &str) -> &str {
    let mut parts = module.rsplit('.').skip_while(|part| part.bytes().all(|b| b.is_ascii_digit()));
    parts.next().unwrap_or(module_of(module))
}

fn collect(value: &Value, names: &[&str], depth: usize, found: &mut HashSet<usize>) {
    let Value::Object(fields) = value else { return };
    let numbers = fields.iter().filter(|(name, _)| names.contains(&name.as_str())).filter_map(|(_, n)| n.as_u64());
    found.extend(numbers.filter_map(|n| usize::try_from(n).ok()).filter(|n| *n > 1));
    if depth < 4 {
        for nested in fields.values() {
            collect(nested, names, depth + 1, found);
        }
    }
}
