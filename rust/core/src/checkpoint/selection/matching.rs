//! How transformers 5 matches the names in `llm_int8_skip_modules`, and the list that says what we did.

use std::collections::{HashMap, HashSet};

use regex::Regex;

use super::rules::one_line;
use crate::error::{Error, Result};

/// One name of a skip list.
///
/// It skips a module whose path it matches as a regular expression from the start to the end of a component
/// (`model.layers.1` skips `model.layers.1.mlp`, not `model.layers.11`), or whose path ends with it (`fc1` skips
/// `decoder.layers.0.fc1`, and also `decoder.my_fc1`).
#[derive(Debug, Clone)]
pub(super) struct SkipKey {
    text: String,
    pattern: Regex,
}

impl SkipKey {
    pub(super) fn new(text: &str) -> Result<Self> {
        let expected = "the name of a module, or a regular expression that matches one from its start";
        if text.is_empty() {
            return Err(Error::argument("skip", "\"\"", expected));
        }
        let pattern = Regex::new(&format!("^(?:{text})$")).map_err(|error| {
            Error::argument("skip", format!("{text:?}"), format!("{expected} ({})", one_line(&error)))
        })?;
        Ok(Self { text: text.to_owned(), pattern })
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn matches(&self, module: &str) -> bool {
        module.ends_with(&self.text)
            || self.pattern.is_match(module)
            || module
                .match_indices('.')
                .any(|(dot, _)| self.pattern.is_match(&module[..dot]) || self.pattern.is_match(&module[..=dot]))
    }
}

/// The same for a plain name, without compiling anything.
pub(super) fn plain_key_matches(key: &str, module: &str) -> bool {
    module.ends_with(key) || module.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'))
}

/// Do the last components of `module` match `pattern`? `*` stands for one component; a leading `^` wants all of them.
pub(super) fn path_matches(pattern: &str, module: &str) -> bool {
    let (pattern, whole) = match pattern.strip_prefix('^') {
        Some(rest) => (rest, true),
        None => (pattern, false),
    };
    if !pattern.contains('*') {
        return module.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || !whole && rest.ends_with('.'));
    }
    let mut components = module.rsplit('.');
    for expected in pattern.rsplit('.') {
        match components.next() {
            Some(found) if expected == "*" || expected == found => {}
            _ => return false,
        }
    }
    !whole || components.next().is_none()
}

/// A short list of names that skips every module of `kept` and none of `converted`, as [`SkipKey`] matches.
///
/// A name is the last component of a path where all modules of that name are kept, else (where `starts` says that
/// paths are known from their start) the start of a path under which everything is kept, else a whole path: the forms
/// that other loaders read too.
pub(super) fn skip_list(kept: &[String], converted: &[String], starts: bool) -> Vec<String> {
    let converted_last: HashSet<&str> = converted.iter().map(|module| last(module)).collect();
    let converted_starts: HashSet<&str> = converted.iter().flat_map(|module| starts_of(module)).collect();
    let mut kept_under: HashMap<&str, usize> = HashMap::new();
    for start in kept.iter().flat_map(|module| starts_of(module)) {
        *kept_under.entry(start).or_default() += 1;
    }
    // Which last components end the name of a converted module; there are few different ones.
    let mut by_last: HashMap<&str, bool> = HashMap::new();
    let mut seen = HashSet::new();
    let mut names: Vec<&str> = Vec::new();
    for module in kept {
        let name = last(module);
        let usable = *by_last.entry(name).or_insert_with(|| {
            !name.bytes().all(|b| b.is_ascii_digit())
                && !converted_starts.contains(name)
                && !converted_last.iter().any(|other| other.ends_with(name))
        });
        let key = if usable {
            name
        } else {
            starts_of(module)
                .find(|start| starts && kept_under[start] > 1 && !converted_starts.contains(start))
                .unwrap_or(module)
        };
        if seen.insert(key) {
            names.push(key);
        }
    }
    // A name may also be the end of a converted path (`layers.0.fc` of `decoder.layers.0.fc`): then only a pattern
    // is exact.
    let lengths: HashSet<usize> = names.iter().map(|key| key.len()).collect();
    let ambiguous: HashSet<&str> = converted
        .iter()
        .flat_map(|module| lengths.iter().filter_map(|n| module.get(module.len().checked_sub(*n)?..)))
        .filter(|end| seen.contains(end))
        .collect();
    let exact = |key: &&str| {
        if ambiguous.contains(key) { format!("^{}", regex::escape(key)) } else { (*key).to_owned() }
    };
    names.iter().map(exact).collect()
}

/// A skip list whose names hold for classes with a head, which have the base model under `prefix`, and for the base model
/// itself: to each name that only one of them would understand, the other's spelling is added where it is exact.
pub(super) fn with_and_without(
    list: Vec<String>,
    prefix: &str,
    is_base: bool,
    kept: &[String],
    converted: &[String],
) -> Vec<String> {
    let start = format!("{prefix}.");
    let pattern = format!("^{}", regex::escape(&start));
    let spelled = |key: &str| -> Option<String> {
        if is_base {
            return match key.strip_prefix('^') {
                Some(rest) => Some(format!("{pattern}{rest}")),
                // The end of a path is found whatever it begins with; the start is not.
                None => {
                    let is_start = |module: &String| module.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'));
                    kept.iter().any(is_start).then(|| format!("{start}{key}"))
                }
            };
        }
        let stripped = key.strip_prefix(&pattern).map(|rest| format!("^{rest}"));
        stripped.or_else(|| key.strip_prefix(&start).map(str::to_owned)).filter(|key| key.len() > 1)
    };
    let other = |module: &String| match module.strip_prefix(&start) {
        Some(rest) => rest.to_owned(),
        None => format!("{start}{module}"),
    };
    let others: Vec<String> = converted.iter().map(other).collect();
    let present: HashSet<String> = list.iter().cloned().collect();
    let mut out = Vec::with_capacity(list.len());
    for key in list {
        let added = spelled(&key).filter(|added| !present.contains(added)).filter(|added| {
            let mut modules = converted.iter().chain(&others);
            match SkipKey::new(added) {
                Ok(pattern) if added.starts_with('^') => !modules.any(|module| pattern.matches(module)),
                _ => !modules.any(|module| plain_key_matches(added, module)),
            }
        });
        out.push(key);
        out.extend(added);
    }
    out
}

/// The starts of a path that end with a component, shortest first, the whole path included.
fn starts_of(module: &str) -> impl Iterator<Item = &str> {
    module.match_indices('.').map(|(dot, _)| &module[..dot]).chain([module])
}

fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}
