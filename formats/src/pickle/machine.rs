//! The unpickler: Python's pickle opcodes over the closed set of values in `value`.
//!
//! No opcode imports, calls or executes anything. `INST`, `OBJ`, the extension registry and
//! out-of-band buffers have no use in checkpoints and are refused by name.
//! Opcodes: <https://github.com/python/cpython/blob/main/Lib/pickletools.py>.

use std::collections::HashMap;

use super::globals::{self, Refusal};
use super::value::{Arena, Id, Value};

/// Why a pickle was not read.
#[derive(Debug)]
pub(super) enum Stop {
    /// Damaged: the reason.
    Damaged(String),
    /// It asks for something that could run code: what, with backticks.
    Forbidden(String),
}

impl From<String> for Stop {
    fn from(reason: String) -> Self {
        Self::Damaged(reason)
    }
}

impl From<&str> for Stop {
    fn from(reason: &str) -> Self {
        Self::Damaged(reason.to_owned())
    }
}

/// Reads one pickle and returns its values and the outermost one.
pub(super) fn unpickle(bytes: &[u8]) -> Result<(Arena, Id), Stop> {
    let mut machine = Machine {
        input: bytes,
        at: 0,
        arena: Arena::new(),
        stack: Vec::new(),
        memo: HashMap::new(),
    };
    loop {
        if let Some(root) = machine.step()? {
            return Ok((machine.arena, root));
        }
    }
}

#[derive(Clone, Copy)]
enum Slot {
    Mark,
    Value(Id),
}

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    arena: Arena,
    stack: Vec<Slot>,
    memo: HashMap<u64, Id>,
}

impl<'a> Machine<'a> {
    /// Executes one opcode; `Some` at the end.
    fn step(&mut self) -> Result<Option<Id>, Stop> {
        let opcode = self.take(1)?[0];
        match opcode {
            b'.' => return self.pop().map(Some),
            0x80 => _ = self.take(1)?,
            0x95 => _ = self.take(8)?,
            b'(' => self.stack.push(Slot::Mark),
            b'0' => {
                // Python lets POP take a mark, too.
                self.stack.pop().ok_or("its pickle pops an empty stack")?;
            }
            b'1' => _ = self.pop_to_mark()?,
            b'2' => {
                let top = self.top()?;
                self.stack.push(Slot::Value(top));
            }
            // None, True, False.
            b'N' | 0x88 | 0x89 => self.push(Value::Opaque)?,
            b'I' | b'L' | b'F' | b'J' | b'K' | b'M' | 0x8a | 0x8b | b'G' => self.number(opcode)?,
            b'S' | b'V' | b'U' | b'T' | b'X' | 0x8c | 0x8d | b'C' | b'B' | 0x8e | 0x96 => {
                self.text(opcode)?;
            }
            b')' | 0x85 | 0x86 | 0x87 | b't' | b']' | b'l' | b'}' | b'd' | 0x8f | 0x91 => {
                self.collection(opcode)?;
            }
            b'a' | b'e' | b's' | b'u' | 0x90 => self.add_items(opcode)?,
            b'p' | b'q' | b'r' | 0x94 | b'g' | b'h' | b'j' => self.memory(opcode)?,
            b'c' | 0x93 => self.global(opcode)?,
            b'R' | 0x81 => {
                let args = self.pop()?;
                self.call(args)?;
            }
            0x92 => {
                self.pop()?;
                let args = self.pop()?;
                self.call(args)?;
            }
            // BUILD sets attributes of an object; no object here has any.
            b'b' => {
                self.pop()?;
                self.top()?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = globals::make_storage(&mut self.arena, id)?;
                self.stack.push(Slot::Value(storage));
            }
            _ => return Err(self.refuse(opcode)),
        }
        Ok(None)
    }

    fn refuse(&mut self, opcode: u8) -> Stop {
        let named = match opcode {
            b'i' => {
                let class = self.line().and_then(|m| Ok(format!("{m}.{}", self.line()?)));
                return Stop::Forbidden(match class {
                    Ok(class) => format!("the opcode `INST` of `{class}`"),
                    Err(_) => "the opcode `INST`".to_owned(),
                });
            }
            b'o' => "the opcode `OBJ`",
            0x82 => "the opcode `EXT1`",
            0x83 => "the opcode `EXT2`",
            0x84 => "the opcode `EXT4`",
            b'P' => "the opcode `PERSID`",
            0x97 => "the opcode `NEXT_BUFFER`",
            0x98 => "the opcode `READONLY_BUFFER`",
            _ => {
                let at = self.at - 1;
                return Stop::Damaged(format!(
                    "its pickle has an unknown opcode {opcode:#04x} at byte: {at}"
                ));
            }
        };
        Stop::Forbidden(named.to_owned())
    }

    fn number(&mut self, opcode: u8) -> Result<(), Stop> {
        let value = match opcode {
            b'J' => {
                let bytes = self.array::<4>()?;
                Value::Int(i64::from(i32::from_le_bytes(bytes)))
            }
            b'K' => Value::Int(i64::from(self.array::<1>()?[0])),
            b'M' => Value::Int(i64::from(u16::from_le_bytes(self.array()?))),
            0x8a => {
                let len = usize::from(self.array::<1>()?[0]);
                long(self.take(len)?)
            }
            0x8b => {
                let len = self.length4()?;
                long(self.take(len)?)
            }
            b'G' => {
                self.take(8)?;
                Value::Opaque
            }
            // Text forms; `I01` and `I00` are booleans.
            b'I' | b'L' => {
                let line = self.line()?;
                let digits = line.strip_suffix('L').unwrap_or(line);
                digits.trim().parse().map_or(Value::Opaque, Value::Int)
            }
            _ => {
                self.line()?;
                Value::Opaque
            }
        };
        self.push(value)
    }

    fn text(&mut self, opcode: u8) -> Result<(), Stop> {
        let len = match opcode {
            b'S' | b'V' => {
                let line = self.line()?;
                let text = if opcode == b'S' { line.trim_matches(['\'', '"']) } else { line };
                return self.push(Value::Text(text.to_owned()));
            }
            b'U' | 0x8c | b'C' => usize::from(self.array::<1>()?[0]),
            b'T' | b'X' | b'B' => self.length4()?,
            _ => self.length8()?,
        };
        let bytes = self.take(len)?;
        let value = match opcode {
            b'C' | b'B' | 0x8e | 0x96 => Value::Opaque,
            // Protocol 2 stores Python 2 byte strings as text of any encoding.
            b'U' | b'T' => Value::Text(String::from_utf8_lossy(bytes).into_owned()),
            _ => Value::Text(
                std::str::from_utf8(bytes)
                    .map_err(|_| "its pickle has a text that is not UTF-8")?
                    .to_owned(),
            ),
        };
        self.push(value)
    }

    fn collection(&mut self, opcode: u8) -> Result<(), Stop> {
        let value = match opcode {
            b')' => Value::Tuple(Vec::new()),
            0x85..=0x87 => {
                let mut items = vec![Arena::OPAQUE; usize::from(opcode - 0x84)];
                for item in items.iter_mut().rev() {
                    *item = self.pop()?;
                }
                Value::Tuple(items)
            }
            b't' => Value::Tuple(self.pop_to_mark()?),
            b']' => Value::List(Vec::new()),
            b'l' => Value::List(self.pop_to_mark()?),
            b'}' => Value::Dict(Vec::new()),
            b'd' => Value::Dict(pairs(&self.pop_to_mark()?)?),
            // Sets: never looked into.
            0x91 => {
                self.pop_to_mark()?;
                Value::Opaque
            }
            _ => Value::Opaque,
        };
        self.push(value)
    }

    fn add_items(&mut self, opcode: u8) -> Result<(), Stop> {
        let items = match opcode {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_to_mark()?,
        };
        let target = self.top()?;
        match (self.arena.get_mut(target), opcode) {
            (Value::List(list), b'a' | b'e') => list.extend(items),
            (Value::Dict(dict), b's' | b'u') => dict.extend(pairs(&items)?),
            (Value::Opaque, _) => {}
            _ => return Err("its pickle adds items to something that is no collection".into()),
        }
        Ok(())
    }

    fn memory(&mut self, opcode: u8) -> Result<(), Stop> {
        let key = match opcode {
            b'q' | b'h' => u64::from(self.array::<1>()?[0]),
            b'r' | b'j' => u64::from(u32::from_le_bytes(self.array()?)),
            0x94 => self.memo.len() as u64,
            _ => {
                let line = self.line()?;
                line.parse().map_err(|_| format!("its pickle has a bad memo key: `{line}`"))?
            }
        };
        if matches!(opcode, b'g' | b'h' | b'j') {
            let id = *self
                .memo
                .get(&key)
                .ok_or_else(|| format!("its pickle asks for a memo never stored: {key}"))?;
            self.stack.push(Slot::Value(id));
        } else {
            let top = self.top()?;
            self.memo.insert(key, top);
        }
        Ok(())
    }

    fn global(&mut self, opcode: u8) -> Result<(), Stop> {
        let (module, name) = if opcode == b'c' {
            (self.line()?.to_owned(), self.line()?.to_owned())
        } else {
            let (name, module) = (self.pop()?, self.pop()?);
            match (self.arena.text(module), self.arena.text(name)) {
                (Some(module), Some(name)) => (module.to_owned(), name.to_owned()),
                _ => return Err("its pickle names a global without texts".into()),
            }
        };
        match globals::resolve(&module, &name) {
            Ok(global) => self.push(Value::Global(global)),
            Err(Refusal::Forbidden) => Err(Stop::Forbidden(format!("`{module}.{name}`"))),
            Err(Refusal::UnknownNumbers) => {
                Err(format!("it holds numbers of an unsupported type: `{module}.{name}`").into())
            }
        }
    }

    fn call(&mut self, args: Id) -> Result<(), Stop> {
        let callable = self.pop()?;
        let result = globals::call(&mut self.arena, callable, args)?;
        self.stack.push(Slot::Value(result));
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<(), Stop> {
        let id = self.arena.add(value)?;
        self.stack.push(Slot::Value(id));
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, Stop> {
        match self.stack.pop() {
            Some(Slot::Value(id)) => Ok(id),
            Some(Slot::Mark) => Err("its pickle pops a mark".into()),
            None => Err("its pickle pops an empty stack".into()),
        }
    }

    fn top(&self) -> Result<Id, Stop> {
        match self.stack.last() {
            Some(Slot::Value(id)) => Ok(*id),
            _ => Err("its pickle needs a value where there is none".into()),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, Stop> {
        let mut items = Vec::new();
        loop {
            match self.stack.pop() {
                Some(Slot::Value(id)) => items.push(id),
                Some(Slot::Mark) => break,
                None => return Err("its pickle has no mark where one is needed".into()),
            }
        }
        items.reverse();
        Ok(items)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let end = self.at.checked_add(len);
        let bytes = end.and_then(|end| self.input.get(self.at..end));
        let bytes = bytes.ok_or_else(|| format!("its pickle ends early, at byte: {}", self.at))?;
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn length4(&mut self) -> Result<usize, Stop> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn length8(&mut self) -> Result<usize, Stop> {
        usize::try_from(u64::from_le_bytes(self.array()?))
            .map_err(|_| "its pickle has an impossible length".into())
    }

    /// Text up to the end of the line.
    fn line(&mut self) -> Result<&'a str, Stop> {
        let rest = &self.input[self.at..];
        let len = rest.iter().position(|byte| *byte == b'\n');
        let len = len.ok_or_else(|| format!("its pickle ends early, at byte: {}", self.at))?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| "its pickle has a broken line".into())
    }
}

/// A little-endian two's complement integer of any length; those beyond i64 matter to nobody.
fn long(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Opaque;
    }
    let fill = if bytes.last().is_some_and(|top| top & 0x80 != 0) { 0xff } else { 0 };
    let mut full = [fill; 8];
    full[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(full))
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, Stop> {
    let (pairs, rest) = items.as_chunks::<2>();
    if rest.is_empty() {
        Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect())
    } else {
        Err("its pickle makes a dictionary with a key without a value".into())
    }
}
