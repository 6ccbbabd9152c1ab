//! Validation errors, worded for the caller.

use std::borrow::Cow;

/// Reason why a value is invalid. It never contains a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(Cow<'static, str>);

impl Invalid {
    /// Creates an error from the text that the caller reads after the field's name.
    pub fn new(detail: impl Into<Cow<'static, str>>) -> Self {
        Self(detail.into())
    }
}

/// An invalid field of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// JSON path of the field, as in `accounts[1]` or `secret.name`.
    pub field: String,
    /// Reason, without the value if that may be secret.
    pub detail: String,
}

impl FieldError {
    /// Creates an error for a field.
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

/// Collects the invalid fields of one request, so that one response reports all of them.
#[derive(Debug, Default)]
pub struct FieldErrors(Vec<FieldError>);

impl FieldErrors {
    /// Returns the value, or records the error for `field`.
    pub fn take<T>(&mut self, field: &str, parsed: Result<T, Invalid>) -> Option<T> {
        parsed.map_err(|invalid| self.refuse(field, invalid)).ok()
    }

    /// Returns the value, or records all errors.
    pub fn take_all<T>(&mut self, parsed: Result<T, Vec<FieldError>>) -> Option<T> {
        parsed.map_err(|errors| self.0.extend(errors)).ok()
    }

    /// Records an error.
    pub fn refuse(&mut self, field: &str, detail: impl ToString) {
        self.0.push(FieldError::new(field, detail));
    }

    /// Builds the value if no error was recorded.
    ///
    /// `build` unwraps the results of [`take`](Self::take) with `?`: they are `Some` unless an
    /// error was recorded.
    ///
    /// # Errors
    ///
    /// All recorded errors.
    pub fn finish<T>(self, build: impl FnOnce() -> Option<T>) -> Result<T, Vec<FieldError>> {
        if self.0.is_empty() {
            build().ok_or_else(|| vec![FieldError::new("", "the request is not valid")])
        } else {
            Err(self.0)
        }
    }
}
