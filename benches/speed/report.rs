//! Report for the reader: tables and goals.

use std::io::{self, Write};

use anyhow::ensure;

/// Prints a table. The first row is the header; all columns but the first are right-aligned.
pub fn table(title: &str, rows: &[Vec<String>]) -> io::Result<()> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
    let mut out = io::stdout().lock();
    writeln!(out, "\n{title}")?;
    for row in rows {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            if column == 0 {
                write!(out, "  {cell:<width$}")?;
            } else {
                write!(out, "  {cell:>width$}")?;
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

/// Makes a row of a table.
pub fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// Measured figures with their bounds.
#[derive(Default)]
pub struct Goals {
    rows: Vec<Vec<String>>,
    /// Exact goals that were missed.
    broken: Vec<String>,
}

impl Goals {
    /// Records a figure with a lower bound.
    pub fn at_least(&mut self, name: &str, bound: f64, figure: f64) {
        self.note(name, &format!("at least {bound}"), figure, figure >= bound);
    }

    /// Records a figure with an upper bound.
    pub fn at_most(&mut self, name: &str, bound: f64, figure: f64) {
        self.note(name, &format!("at most {bound}"), figure, figure <= bound);
    }

    /// Records a figure that does not depend on the machine. A miss fails the run.
    pub fn exactly(&mut self, name: &str, expected: usize, figure: usize) {
        let holds = figure == expected;
        self.note(name, &format!("exactly {expected}"), float(figure), holds);
        if !holds {
            self.broken.push(format!("{name}: {figure} instead of {expected}"));
        }
    }

    fn note(&mut self, name: &str, bound: &str, figure: f64, holds: bool) {
        self.rows.push(row([name, bound, &format!("{figure:.2}"), if holds { "holds" } else { "MISSED" }]));
    }

    /// Prints all goals. A missed bound is not an error: the machine may be busy.
    ///
    /// # Errors
    ///
    /// The exact goals that were missed.
    pub fn print(&self) -> anyhow::Result<()> {
        table("Goals", &self.rows)?;
        ensure!(self.broken.is_empty(), "missed: {}", self.broken.join("; "));
        Ok(())
    }
}

/// Prints the current step to standard error.
pub fn progress(what: &str) {
    eprintln!("{what} …");
}

/// Figures of several rounds, sorted.
pub struct Rounds(Vec<f64>);

impl FromIterator<f64> for Rounds {
    fn from_iter<I: IntoIterator<Item = f64>>(figures: I) -> Self {
        let mut figures: Vec<f64> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        Self(figures)
    }
}

impl Rounds {
    /// Returns the median.
    pub fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        match self.0.get(middle) {
            Some(upper) if self.0.len().is_multiple_of(2) => f64::midpoint(self.0[middle - 1], *upper),
            Some(one) => *one,
            None => f64::NAN,
        }
    }

    /// Returns the median and the range.
    pub fn spread(&self, digits: usize) -> [String; 2] {
        let show = |figure: Option<&f64>| format!("{:.digits$}", figure.copied().unwrap_or(f64::NAN));
        [format!("{:.digits$}", self.median()), format!("{} to {}", show(self.0.first()), show(self.0.last()))]
    }
}

/// Converts a count for a division.
#[expect(clippy::cast_precision_loss, reason = "counts here are far below 2^52")]
pub fn float(count: usize) -> f64 {
    count as f64
}
