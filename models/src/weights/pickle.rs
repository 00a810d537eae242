//! A reader of the pickles inside `.pth` files that interprets them as data: it finds tensors and never runs code.
//!
//! A pickle is a program for a stack machine. PyTorch's `torch.save` of a `{name: tensor}` dictionary uses a handful
//! of instructions and three callables; these are interpreted here as data, and everything else is refused.
//! Source: Python's `pickletools` (opcodes), PyTorch's `torch/serialization.py` and `torch/_utils.py`.

use std::collections::HashMap;

use super::dtype::StoredDType;

/// A tensor as the pickle describes it: a strided view of a storage, which is another file of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct View {
    /// Name of the storage (`archive/data/<key>`).
    pub key: String,
    /// Element type of the storage.
    pub dtype: StoredDType,
    /// First element, in elements.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<usize>,
}

/// A value on the machine's stack.
#[derive(Debug, Clone)]
enum Value {
    Mark,
    None,
    Bool,
    Int(i64),
    Text(String),
    Tuple(Vec<Value>),
    /// A dictionary, by its index in [`Machine::dicts`]: pickles refer to one object from several places.
    Dict(usize),
    Global(Callable),
    Storage {
        key: String,
        dtype: StoredDType,
    },
    Tensor(Box<View>),
}

/// The names that a plain tensor dictionary may refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Callable {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    Storage(StoredDType),
}

/// Tuples within tuples: real ones go three deep.
const MAX_DEPTH: usize = 8;

/// Axes of a tensor.
const MAX_RANK: usize = 8;

/// Values of a pickle in all: the largest checkpoints have a hundred thousand.
const MAX_VALUES: usize = 1 << 20;

type Answer<T> = Result<T, String>;

/// Reads the tensors of a pickled `{name: tensor}` dictionary, in its order.
pub(crate) fn read(bytes: &[u8]) -> Answer<Vec<(String, View)>> {
    // A real checkpoint copies about one value for every two bytes of its pickle.
    let limit = 1024 + 2 * bytes.len();
    let (stack, memo, dicts) = (Vec::new(), HashMap::new(), Vec::new());
    let mut machine = Machine { input: bytes, stack, memo, dicts, made: 0, copied: 0, limit };
    let top = machine.run()?;
    let Value::Dict(id) = top else {
        return Err(not_plain("its top value is not a dictionary"));
    };
    let items = std::mem::take(machine.dicts.get_mut(id).ok_or_else(damaged)?);
    items.into_iter().map(named_tensor).collect()
}

fn named_tensor((key, value): (Value, Value)) -> Answer<(String, View)> {
    match (key, value) {
        (Value::Text(name), Value::Tensor(view)) => Ok((name, *view)),
        (Value::Text(name), _) => Err(not_plain(&format!("`{name}` is not a tensor"))),
        _ => Err(not_plain("one of its keys is not a text")),
    }
}

fn not_plain(why: &str) -> String {
    format!(
        "this .pth is not a plain tensor dictionary: {why}. Nothing in it was run. \
         Save the model's state dict alone, best as .safetensors"
    )
}

fn damaged() -> String {
    "the pickle in this .pth is damaged; fetch the file again".to_owned()
}

struct Machine<'a> {
    input: &'a [u8],
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
    dicts: Vec<Vec<(Value, Value)>>,
    /// Values put on the stack so far.
    made: usize,
    /// Values copied to and from the memo, and how many may be.
    copied: usize,
    limit: usize,
}

impl Machine<'_> {
    fn run(&mut self) -> Answer<Value> {
        loop {
            let op = self.byte()?;
            match op {
                b'.' => return self.pop(),
                0x80 => self.protocol()?,
                0x95 => drop(self.take(8)?),
                b'(' => self.push(Value::Mark)?,
                b'N' => self.push(Value::None)?,
                0x88 | 0x89 => self.push(Value::Bool)?,
                b'K' => self.int(1)?,
                b'M' => self.int(2)?,
                b'J' => self.int(4)?,
                0x8a => self.long()?,
                b'X' => self.text(4)?,
                0x8c => self.text(1)?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b't' => self.tuple_to_mark()?,
                0x85..=0x87 => self.tuple_of(usize::from(op - 0x84))?,
                b'}' => self.new_dict()?,
                b's' => self.set_item()?,
                b'u' => self.set_items()?,
                b'q' => self.put(1)?,
                b'r' => self.put(4)?,
                0x94 => self.store(self.memo.len() as u32)?,
                b'h' => self.get(1)?,
                b'j' => self.get(4)?,
                b'c' => self.global()?,
                0x93 => self.stack_global()?,
                b'Q' => self.persistent()?,
                b'R' => self.reduce()?,
                b'b' => self.build()?,
                other => return Err(not_plain(&format!("it uses the pickle instruction 0x{other:02x}"))),
            }
        }
    }

    fn byte(&mut self) -> Answer<u8> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, n: usize) -> Answer<&[u8]> {
        if n > self.input.len() {
            return Err(damaged());
        }
        let (head, tail) = self.input.split_at(n);
        self.input = tail;
        Ok(head)
    }

    /// A little-endian number of `n` bytes, up to eight.
    fn number(&mut self, n: usize) -> Answer<u64> {
        Ok(self.take(n)?.iter().rev().fold(0, |acc, &b| acc << 8 | u64::from(b)))
    }

    fn line(&mut self) -> Answer<String> {
        let n = self.input.iter().position(|&b| b == b'\n').ok_or_else(damaged)?;
        let text = String::from_utf8(self.take(n)?.to_vec()).map_err(|_| damaged())?;
        self.take(1)?;
        Ok(text)
    }

    /// Puts a value on the stack; how many there may be in all bounds the memory of stack, tuples and dictionaries.
    fn push(&mut self, value: Value) -> Answer<()> {
        self.made += 1;
        if self.made > MAX_VALUES {
            return Err(not_plain("it holds more values than any real checkpoint"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Answer<Value> {
        self.stack.pop().ok_or_else(damaged)
    }

    fn protocol(&mut self) -> Answer<()> {
        match self.byte()? {
            2..=5 => Ok(()),
            n => Err(not_plain(&format!("its pickle protocol is {n}"))),
        }
    }

    fn int(&mut self, n: usize) -> Answer<()> {
        let value = self.number(n)?;
        // Only the four-byte form is signed.
        let value = if n == 4 { i64::from(value as u32 as i32) } else { value as i64 };
        self.push(Value::Int(value))
    }

    fn long(&mut self) -> Answer<()> {
        let n = usize::from(self.byte()?);
        if n > 8 {
            return Err(not_plain("it holds a number of more than 64 bits"));
        }
        let value = self.number(n)?;
        // Two's complement of n bytes.
        let shift = 64 - 8 * n as u32;
        let value = if n == 0 { 0 } else { ((value << shift) as i64) >> shift };
        self.push(Value::Int(value))
    }

    fn text(&mut self, length_bytes: usize) -> Answer<()> {
        let n = self.number(length_bytes)? as usize;
        let text = String::from_utf8(self.take(n)?.to_vec()).map_err(|_| damaged())?;
        self.push(Value::Text(text))
    }

    fn items_to_mark(&mut self) -> Answer<Vec<Value>> {
        let mark = self.stack.iter().rposition(|v| matches!(v, Value::Mark)).ok_or_else(damaged)?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn tuple_to_mark(&mut self) -> Answer<()> {
        let items = self.items_to_mark()?;
        self.push_tuple(items)
    }

    fn tuple_of(&mut self, n: usize) -> Answer<()> {
        let at = self.stack.len().checked_sub(n).ok_or_else(damaged)?;
        let items = self.stack.split_off(at);
        if items.iter().any(|v| matches!(v, Value::Mark)) {
            return Err(damaged());
        }
        self.push_tuple(items)
    }

    fn push_tuple(&mut self, items: Vec<Value>) -> Answer<()> {
        if items.iter().map(depth).max().unwrap_or(0) >= MAX_DEPTH {
            return Err(not_plain("its values are nested beyond any real checkpoint"));
        }
        self.push(Value::Tuple(items))
    }

    fn new_dict(&mut self) -> Answer<()> {
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() - 1))
    }

    fn top_dict(&mut self) -> Answer<&mut Vec<(Value, Value)>> {
        match self.stack.last() {
            Some(Value::Dict(id)) => self.dicts.get_mut(*id).ok_or_else(damaged),
            _ => Err(damaged()),
        }
    }

    fn set_item(&mut self) -> Answer<()> {
        let (value, key) = (self.pop()?, self.pop()?);
        self.top_dict()?.push((key, value));
        Ok(())
    }

    fn set_items(&mut self) -> Answer<()> {
        let mut items = self.items_to_mark()?.into_iter();
        let dict = self.top_dict()?;
        while let Some(key) = items.next() {
            dict.push((key, items.next().ok_or_else(damaged)?));
        }
        Ok(())
    }

    fn put(&mut self, n: usize) -> Answer<()> {
        let slot = self.number(n)? as u32;
        self.store(slot)
    }

    fn store(&mut self, slot: u32) -> Answer<()> {
        let value = self.stack.last().ok_or_else(damaged)?.clone();
        self.charge(&value)?;
        self.memo.insert(slot, value);
        Ok(())
    }

    fn get(&mut self, n: usize) -> Answer<()> {
        let slot = self.number(n)? as u32;
        let value = self.memo.get(&slot).ok_or_else(damaged)?.clone();
        self.charge(&value)?;
        self.push(value)
    }

    /// Counts what a copy costs: nested tuples fetched again and again could otherwise grow without bound.
    fn charge(&mut self, value: &Value) -> Answer<()> {
        self.copied = self.copied.saturating_add(weight(value));
        match self.copied > self.limit {
            true => Err(not_plain("it repeats its values beyond any real checkpoint")),
            false => Ok(()),
        }
    }

    fn global(&mut self) -> Answer<()> {
        let (module, name) = (self.line()?, self.line()?);
        self.push(Value::Global(callable(&module, &name)?))
    }

    fn stack_global(&mut self) -> Answer<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        let (Value::Text(module), Value::Text(name)) = (module, name) else {
            return Err(damaged());
        };
        self.push(Value::Global(callable(&module, &name)?))
    }

    /// `('storage', <type>, key, location, elements)`: the only persistent id that PyTorch writes.
    fn persistent(&mut self) -> Answer<()> {
        let Value::Tuple(id) = self.pop()? else { return Err(damaged()) };
        match id.as_slice() {
            [Value::Text(kind), Value::Global(Callable::Storage(dtype)), Value::Text(key), ..]
                if kind == "storage" =>
            {
                self.push(Value::Storage { key: key.clone(), dtype: *dtype })
            }
            _ => Err(not_plain("it refers to something that is no tensor storage")),
        }
    }

    fn reduce(&mut self) -> Answer<()> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments), Value::Global(callable)) = (arguments, callable) else {
            return Err(not_plain("it calls something that is no tensor constructor"));
        };
        match callable {
            Callable::OrderedDict if arguments.is_empty() => self.new_dict(),
            Callable::RebuildTensor => self.push(rebuild_tensor(&arguments)?),
            Callable::RebuildParameter => match arguments.into_iter().next() {
                Some(Value::Tensor(view)) => self.push(Value::Tensor(view)),
                _ => Err(damaged()),
            },
            _ => Err(not_plain("it builds something that is no tensor")),
        }
    }

    /// A state dict carries attributes (its `_metadata`), which say nothing about tensors: dropped.
    fn build(&mut self) -> Answer<()> {
        self.pop()?;
        self.top_dict().map(drop).map_err(|_| not_plain("it sets the state of an object"))
    }
}

fn weight(value: &Value) -> usize {
    match value {
        Value::Tuple(items) => 1 + items.iter().map(weight).sum::<usize>(),
        Value::Text(text) | Value::Storage { key: text, .. } => 1 + text.len() / 32,
        Value::Tensor(view) => 1 + view.shape.len() + view.key.len() / 32,
        _ => 1,
    }
}

/// Nesting of tuples in this value; bounded because every tuple is checked when it is created.
fn depth(value: &Value) -> usize {
    match value {
        Value::Tuple(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// `_rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, hooks, ...)`.
fn rebuild_tensor(arguments: &[Value]) -> Answer<Value> {
    let [Value::Storage { key, dtype }, Value::Int(offset), Value::Tuple(shape), Value::Tuple(strides), ..] =
        arguments
    else {
        return Err(damaged());
    };
    let (shape, strides) = (sizes(shape)?, sizes(strides)?);
    if shape.len() != strides.len() || shape.len() > MAX_RANK {
        return Err(damaged());
    }
    let offset = usize::try_from(*offset).map_err(|_| damaged())?;
    Ok(Value::Tensor(Box::new(View { key: key.clone(), dtype: *dtype, offset, shape, strides })))
}

fn sizes(values: &[Value]) -> Answer<Vec<usize>> {
    let size = |v: &Value| match v {
        Value::Int(n) => usize::try_from(*n).map_err(|_| damaged()),
        _ => Err(damaged()),
    };
    values.iter().map(size).collect()
}

fn callable(module: &str, name: &str) -> Answer<Callable> {
    Ok(match (module, name) {
        ("torch._utils", "_rebuild_tensor_v2") => Callable::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Callable::RebuildParameter,
        ("collections", "OrderedDict") => Callable::OrderedDict,
        ("torch", storage) => match storage_dtype(storage) {
            Some(dtype) => Callable::Storage(dtype),
            None => return Err(not_plain(&format!("it refers to `torch.{storage}`"))),
        },
        _ => return Err(not_plain(&format!("it refers to `{module}.{name}`"))),
    })
}

fn storage_dtype(name: &str) -> Option<StoredDType> {
    Some(match name {
        "DoubleStorage" => StoredDType::F64,
        "FloatStorage" => StoredDType::F32,
        "HalfStorage" => StoredDType::F16,
        "BFloat16Storage" => StoredDType::BF16,
        "LongStorage" => StoredDType::I64,
        "IntStorage" => StoredDType::I32,
        "ShortStorage" => StoredDType::I16,
        "CharStorage" => StoredDType::I8,
        "ByteStorage" => StoredDType::U8,
        "BoolStorage" => StoredDType::Bool,
        _ => return None,
    })
}
