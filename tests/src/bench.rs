//! The table of `make bench`: what was measured, and what it may be at most.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::error::{Error, Result};

/// What a value counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Milliseconds of the counting node's clock: 250,000 instructions each.
    VirtualMs,
    /// Millions of instructions.
    Instructions,
    /// Thousands of instructions.
    Thousands,
    /// MiB.
    Mib,
    /// A quotient.
    Ratio,
}

impl Unit {
    /// A span of the counting node's clock, which advances 4 ns for each instruction.
    pub fn of(self, time: Duration) -> f64 {
        let ms = time.as_secs_f64() * 1e3;
        match self {
            Self::Instructions => ms / 4.0,
            Self::Thousands => ms * 250.0,
            Self::VirtualMs | Self::Mib | Self::Ratio => ms,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::VirtualMs => "vms",
            Self::Instructions => "M instr",
            Self::Thousands => "k instr",
            Self::Mib => "MiB",
            Self::Ratio => "",
        }
    }

    fn digits(self) -> usize {
        match self {
            Self::VirtualMs | Self::Instructions | Self::Thousands => 1,
            Self::Mib | Self::Ratio => 2,
        }
    }
}

/// One thing that was measured, some times.
#[derive(Debug, Clone)]
pub struct Row {
    /// What it is called in the table, in the budgets and in `make bench ROW=name`.
    pub name: &'static str,
    /// What it is.
    pub what: &'static str,
    pub unit: Unit,
    /// At least one.
    pub values: Vec<f64>,
}

impl Row {
    /// The value that counts: the median, which no single repeat can spoil.
    pub fn value(&self) -> f64 {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        match values.len() {
            0 => f64::NAN,
            length if length % 2 == 1 => values[length / 2],
            length => (values[length / 2 - 1] + values[length / 2]) / 2.0,
        }
    }

    /// The lowest and the highest value, if there are several.
    fn spread(&self) -> Option<(f64, f64)> {
        let lowest = self.values.iter().copied().reduce(f64::min)?;
        let highest = self.values.iter().copied().reduce(f64::max)?;
        (self.values.len() > 1).then_some((lowest, highest))
    }
}

/// The most that each row may be, by its name.
#[derive(Debug)]
pub struct Budgets(BTreeMap<String, f64>);

impl Budgets {
    /// From the text of `budgets.toml`. Each budget must be one of the rows `names`: a row that is renamed keeps its budget.
    pub fn parse(text: &str, names: &[&str]) -> Result<Self> {
        let budgets: BTreeMap<String, f64> = toml::from_str(text)
            .map_err(|error| Error::Unfit(format!("budgets.toml cannot be read: {error}")))?;
        for (name, budget) in &budgets {
            if !names.contains(&name.as_str()) {
                return Err(Error::Unfit(format!(
                    "budgets.toml has {name:?}, which is no row; rows: {}",
                    names.join(", ")
                )));
            }
            if !budget.is_finite() {
                return Err(Error::Unfit(format!(
                    "the budget of {name} is {budget}, no number"
                )));
            }
        }
        Ok(Self(budgets))
    }

    fn of(&self, row: &Row) -> Option<f64> {
        self.0.get(row.name).copied()
    }

    /// Whether a row is beyond its budget. What could not be measured (not a number) is.
    fn is_broken(&self, row: &Row) -> bool {
        self.of(row)
            .is_some_and(|budget| row.value().is_nan() || row.value() > budget)
    }
}

/// The finished table.
#[derive(Debug)]
pub struct Report<'a> {
    pub rows: &'a [Row],
    pub budgets: &'a Budgets,
}

impl Report<'_> {
    /// One sentence for each row that is beyond its budget.
    pub fn broken(&self) -> Vec<String> {
        let broken = self.rows.iter().filter(|row| self.budgets.is_broken(row));
        broken
            .map(|row| {
                let (unit, digits) = (row.unit.name(), row.unit.digits());
                format!(
                    "{} is {:.digits$} {unit}, beyond its budget of {} {unit}: {}",
                    row.name,
                    row.value(),
                    self.budgets.of(row).unwrap_or_default(),
                    row.what
                )
            })
            .collect()
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            formatter,
            "{:<9} {:<7} {:<17} {:<10} {:<28} what",
            "value", "unit", "lowest-highest", "budget", "command"
        )?;
        for row in self.rows {
            let digits = row.unit.digits();
            let spread = row
                .spread()
                .map(|(lowest, highest)| format!("{lowest:.digits$}-{highest:.digits$}"));
            let verdict = if self.budgets.is_broken(row) {
                " BROKEN"
            } else {
                ""
            };
            let budget = self
                .budgets
                .of(row)
                .map(|budget| format!("{budget}{verdict}"));
            writeln!(
                formatter,
                "{:<9} {:<7} {:<17} {:<10} {:<28} {}",
                format!("{:.digits$}", row.value()),
                row.unit.name(),
                spread.unwrap_or_default(),
                budget.unwrap_or_default(),
                format!("make bench ROW={}", row.name),
                row.what
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, values: &[f64]) -> Row {
        Row {
            name,
            what: "something",
            unit: Unit::VirtualMs,
            values: values.to_vec(),
        }
    }

    #[test]
    fn the_value_of_a_row_is_the_median() {
        assert_eq!(row("a", &[9.0, 1.0, 2.0]).value(), 2.0);
        assert_eq!(row("a", &[9.0, 1.0, 2.0, 4.0]).value(), 3.0);
        assert_eq!(row("a", &[7.0]).value(), 7.0);
        assert!(row("a", &[]).value().is_nan());
    }

    #[test]
    fn a_budget_is_the_most_that_a_row_may_be() {
        let budgets = Budgets::parse("a = 2\nb = 2.5", &["a", "b", "c"]).unwrap();
        let rows = [
            row("a", &[2.0]),
            row("b", &[2.4, 2.6, 2.6]),
            row("c", &[1e9]),
        ];
        let report = Report {
            rows: &rows,
            budgets: &budgets,
        };
        assert_eq!(
            report.broken(),
            ["b is 2.6 vms, beyond its budget of 2.5 vms: something"]
        );
        let table = report.to_string();
        let line = table.lines().nth(2).unwrap();
        assert!(line.contains("2.4-2.6") && line.contains("2.5 BROKEN"));
        assert!(line.contains("make bench ROW=b"));
        assert_eq!(table.matches("BROKEN").count(), 1);
    }

    #[test]
    fn what_could_not_be_measured_breaks_its_budget() {
        let budgets = Budgets::parse("a = 2", &["a"]).unwrap();
        assert!(budgets.is_broken(&row("a", &[])));
        assert!(budgets.is_broken(&row("a", &[f64::NAN])));
    }

    #[test]
    fn a_budget_for_nothing_is_an_error() {
        let error = Budgets::parse("ab = 2", &["a", "b"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("\"ab\"") && error.contains("a, b"));
        assert!(Budgets::parse("a = 'much'", &["a"]).is_err());
        assert!(Budgets::parse("a = nan", &["a"]).is_err());
    }

    #[test]
    fn an_instruction_is_four_nanoseconds() {
        let time = Duration::from_millis(8);
        assert_eq!(Unit::VirtualMs.of(time), 8.0);
        assert_eq!(Unit::Instructions.of(time), 2.0);
        assert_eq!(Unit::Thousands.of(time), 2000.0);
    }
}
