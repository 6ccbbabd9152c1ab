//! Refused values: what was wrong, said so that the caller can mend it.

use std::borrow::Cow;

/// Why a value was refused, in words fit for the caller; never contains a secret value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(Cow<'static, str>);

impl Invalid {
    /// Makes a refusal from the sentence that the caller will read.
    pub fn new(detail: impl Into<Cow<'static, str>>) -> Self {
        Self(detail.into())
    }
}

/// One refused field of a request: its JSON path and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// JSON path of the field, as in `accounts[1]` or `secret.name`.
    pub field: String,
    /// What is wrong with it, without its value where that could be secret.
    pub detail: String,
}

impl FieldError {
    /// Names a field and what is wrong with it.
    #[expect(clippy::needless_pass_by_value, reason = "callers pass errors and literals alike")]
    pub fn new(field: impl Into<String>, detail: impl ToString) -> Self {
        Self { field: field.into(), detail: detail.to_string() }
    }
}

impl From<Vec<FieldError>> for Invalid {
    /// Joins the errors of several fields into one.
    fn from(errors: Vec<FieldError>) -> Self {
        let details = errors.into_iter().map(|FieldError { field, detail }| format!("{field} {detail}"));
        Self::new(details.collect::<Vec<_>>().join("; "))
    }
}

/// Gathers the refused fields of one request, so that a caller sees every problem at once.
#[derive(Debug, Default)]
pub struct FieldErrors(Vec<FieldError>);

impl FieldErrors {
    /// Returns the value, or remembers why `field` was refused.
    pub fn take<T>(&mut self, field: &str, parsed: Result<T, Invalid>) -> Option<T> {
        parsed.map_err(|invalid| self.refuse(field, invalid)).ok()
    }

    /// Returns the value, or remembers every field that was refused.
    pub fn take_all<T>(&mut self, parsed: Result<T, Vec<FieldError>>) -> Option<T> {
        parsed.map_err(|errors| self.0.extend(errors)).ok()
    }

    /// Remembers one more refused field.
    pub fn refuse(&mut self, field: &str, detail: impl ToString) {
        self.0.push(FieldError::new(field, detail));
    }

    /// Ends the gathering: builds the value if every field was good, else returns all that were refused.
    ///
    /// `build` unwraps what [`take`](Self::take) returned with `?`, which cannot fail once nothing was refused.
    ///
    /// # Errors
    ///
    /// All fields that were refused.
    pub fn finish<T>(self, build: impl FnOnce() -> Option<T>) -> Result<T, Vec<FieldError>> {
        if self.0.is_empty() {
            build().ok_or_else(|| vec![FieldError::new("", "the request is not valid")])
        } else {
            Err(self.0)
        }
    }
}
