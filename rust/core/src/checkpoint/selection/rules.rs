//! `REGEX=nf4|fp4|int8|keep`: a user's exceptions to the selection.

use std::fmt;
use std::str::FromStr;

use regex::Regex;

use crate::checkpoint::weight_type::WeightType;
use crate::error::{Error, Result};

/// What a rule must look like, for messages.
const FORM: &str = "REGEX=nf4, REGEX=fp4, REGEX=int8 or REGEX=keep";

/// One exception: tensors whose name the regular expression finds are quantized to a type, or kept.
#[derive(Debug, Clone)]
pub struct Rule {
    pattern: Regex,
    quant_type: Option<WeightType>,
    text: String,
}

impl Rule {
    /// The type asked for; `None` keeps the tensor.
    pub fn quant_type(&self) -> Option<WeightType> {
        self.quant_type
    }

    /// Does the pattern occur in a tensor's name, or in the name of the module that holds it?
    pub fn matches(&self, tensor: &str, module: &str) -> bool {
        self.pattern.is_match(tensor) || (!module.is_empty() && self.pattern.is_match(module))
    }
}

impl FromStr for Rule {
    type Err = Error;

    /// Splits at the last `=`, so that the pattern may hold one.
    fn from_str(text: &str) -> Result<Self> {
        let quoted = || format!("{text:?}");
        let Some((pattern, treatment)) = text.rsplit_once('=') else {
            return Err(Error::argument("rule", quoted(), FORM));
        };
        let quant_type = match treatment.trim() {
            "keep" => None,
            name => Some(name.parse().map_err(|_| {
                Error::argument("rule", quoted(), format!("{FORM} (found {name:?} after the last '=')"))
            })?),
        };
        if pattern.is_empty() {
            return Err(Error::argument("rule", quoted(), format!("{FORM} (the pattern is empty; '.' matches all)")));
        }
        let pattern = Regex::new(pattern).map_err(|error| {
            Error::argument("rule", quoted(), format!("a regular expression ({})", one_line(&error)))
        })?;
        Ok(Self { pattern, quant_type, text: text.to_owned() })
    }
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Display for Rule {
    /// As the user wrote it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The last line of a `regex` error, which says what is wrong; those before draw the place.
pub(super) fn one_line(error: &regex::Error) -> String {
    let text = error.to_string();
    text.lines().last().unwrap_or("").trim_start_matches("error: ").to_owned()
}
