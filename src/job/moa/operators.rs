//! The operators: how strongly they bind, and what they make of two values.

use std::cell::Cell;
use std::cmp::Ordering;

use super::value::{Fault, Kind, Outcome, Value, finite};

/// What stands between two values.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Operator {
    Or,
    And,
    Equal,
    NotEqual,
    LessEqual,
    GreaterEqual,
    Less,
    Greater,
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
}

/// The operators with how strongly they bind; longer ones first.
pub(super) const OPERATORS: [(&str, Operator, u8); 13] = [
    ("||", Operator::Or, 1),
    ("&&", Operator::And, 2),
    ("==", Operator::Equal, 3),
    ("!=", Operator::NotEqual, 3),
    ("<=", Operator::LessEqual, 3),
    (">=", Operator::GreaterEqual, 3),
    ("<", Operator::Less, 3),
    (">", Operator::Greater, 3),
    ("+", Operator::Add, 4),
    ("-", Operator::Subtract, 4),
    ("*", Operator::Multiply, 5),
    ("/", Operator::Divide, 5),
    ("%", Operator::Modulo, 5),
];

impl Operator {
    /// Computes what it makes of two values; `sign` is how it was written, `room` how many bytes may
    /// still be made.
    pub(super) fn apply(
        self,
        sign: &str,
        left: Outcome,
        right: Outcome,
        room: &Cell<usize>,
    ) -> Outcome {
        let left = match (self, left) {
            (Self::Or, Err(fault)) if fault.missing => return right,
            (_, left) => left?,
        };
        match self {
            Self::Or if left.truthy() => return Ok(left),
            Self::And if !left.truthy() => return Ok(left),
            Self::Or | Self::And => {
                return right.map(|right| right.marked(left.hidden()));
            }
            Self::Equal
            | Self::NotEqual
            | Self::LessEqual
            | Self::GreaterEqual
            | Self::Less
            | Self::Greater
            | Self::Add
            | Self::Subtract
            | Self::Multiply
            | Self::Divide
            | Self::Modulo => {}
        }
        let right = right?;
        let hidden = left.hidden() || right.hidden();
        let compared =
            |holds: fn(Ordering) -> bool| Ok(Value::new(Kind::Bool(holds(left.order(&right)))));
        let value = match self {
            Self::Equal => compared(Ordering::is_eq),
            Self::NotEqual => compared(Ordering::is_ne),
            Self::LessEqual => compared(Ordering::is_le),
            Self::GreaterEqual => compared(Ordering::is_ge),
            Self::Less => compared(Ordering::is_lt),
            Self::Greater => compared(Ordering::is_gt),
            Self::Or
            | Self::And
            | Self::Add
            | Self::Subtract
            | Self::Multiply
            | Self::Divide
            | Self::Modulo => match (self, &left.kind, &right.kind) {
                (_, Kind::Number(a), Kind::Number(b)) => self.arithmetic(*a, *b),
                (Self::Add, Kind::Text(_), Kind::Text(_)) => {
                    let mut text = String::new();
                    left.write(false, room, &mut text)
                        .and_then(|()| right.write(false, room, &mut text))
                        .map(|()| Value::text(text))
                }
                _ => Err(Fault::new(format!(
                    "`{sign}` cannot take {} and {}",
                    left.word(),
                    right.word()
                ))),
            },
        }?;
        Ok(value.marked(hidden))
    }

    fn arithmetic(self, a: f64, b: f64) -> Outcome {
        let divides = matches!(self, Self::Divide | Self::Modulo);
        if divides && b.total_cmp(&0.0).is_eq() {
            return Err(Fault::new("a division by zero"));
        }
        finite(match self {
            Self::Add => a + b,
            Self::Subtract => a - b,
            Self::Multiply => a * b,
            Self::Divide => a / b,
            Self::Modulo => a % b,
            Self::Or
            | Self::And
            | Self::Equal
            | Self::NotEqual
            | Self::LessEqual
            | Self::GreaterEqual
            | Self::Less
            | Self::Greater => f64::NAN,
        })
    }
}
