//! Reads a component's JSON config: typed values, lists, and a refusal of what is not computed.

use serde_json::Value;

use crate::{ModelError, Result};

/// A config and the component it describes, for messages.
#[derive(Clone, Copy)]
pub(crate) struct ConfigValue<'a> {
    pub component: &'static str,
    pub json: &'a Value,
}

impl ConfigValue<'_> {
    pub(crate) fn error(&self, key: &str, reason: &str) -> ModelError {
        ModelError::Config {
            component: self.component,
            key: key.to_owned(),
            reason: reason.to_owned(),
            got: self.json.get(key).map_or_else(|| "missing".to_owned(), Value::to_string),
        }
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// A positive whole number, `None` when absent or null.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>> {
        self.present(key)
            .map(|value| {
                positive(value).ok_or_else(|| self.error(key, "a positive whole number is needed"))
            })
            .transpose()
    }

    /// Positive whole numbers given as a list of `len`, or as one number for all.
    pub(crate) fn counts(&self, key: &str, len: usize) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        let counts = match value {
            Value::Array(list) => list.iter().map(positive).collect::<Option<Vec<_>>>(),
            one => positive(one).map(|count| vec![count; len]),
        };
        match counts {
            Some(counts) if counts.len() == len => Ok(Some(counts)),
            _ => Err(self.error(key, &format!("a number or a list of {len} numbers is needed"))),
        }
    }

    /// A list of positive whole numbers of any length but 0, which must be there.
    pub(crate) fn list(&self, key: &str) -> Result<Vec<usize>> {
        let list = self.present(key).and_then(Value::as_array);
        list.and_then(|list| list.iter().map(positive).collect::<Option<Vec<_>>>())
            .filter(|list| !list.is_empty())
            .ok_or_else(|| self.error(key, "a list of positive whole numbers is needed"))
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f32>> {
        self.present(key)
            .map(|value| {
                let number = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
                number.ok_or_else(|| self.error(key, "a number is needed"))
            })
            .transpose()
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.present(key)
            .map(|value| {
                value.as_bool().ok_or_else(|| self.error(key, "`true` or `false` is needed"))
            })
            .transpose()
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.present(key).and_then(Value::as_str)
    }

    /// A list of names, empty when absent.
    pub(crate) fn names(&self, key: &str) -> Vec<&str> {
        let list = self.present(key).and_then(Value::as_array);
        list.map_or_else(Vec::new, |list| list.iter().filter_map(Value::as_str).collect())
    }

    /// Refuses a key whose value is neither absent, null nor one of `accepted`.
    pub(crate) fn require(&self, key: &str, accepted: &[Value]) -> Result<()> {
        match self.present(key) {
            Some(value) if !accepted.contains(value) => {
                let accepted: Vec<String> = accepted.iter().map(Value::to_string).collect();
                let reason = match accepted.len() {
                    0 => "it must be absent".to_owned(),
                    _ => format!("only {} is computed here", accepted.join(" or ")),
                };
                Err(self.error(key, &reason))
            }
            _ => Ok(()),
        }
    }
}

fn positive(value: &Value) -> Option<usize> {
    value.as_u64().filter(|n| *n > 0).and_then(|n| usize::try_from(n).ok())
}
