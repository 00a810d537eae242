//! The element types found in checkpoint files.

use kernels::DType;

/// An element type as a file stores it. Wider than what the models compute in: a file may hold integers
/// and booleans that no model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum StoredDType {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3,
    F8E5M2,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
}

/// Type, safetensors name, bytes of an element. Source: the safetensors format, `Dtype`.
const TABLE: &[(StoredDType, &str, usize)] = &[
    (StoredDType::F64, "F64", 8),
    (StoredDType::F32, "F32", 4),
    (StoredDType::F16, "F16", 2),
    (StoredDType::BF16, "BF16", 2),
    (StoredDType::F8E4M3, "F8_E4M3", 1),
    (StoredDType::F8E5M2, "F8_E5M2", 1),
    (StoredDType::I64, "I64", 8),
    (StoredDType::I32, "I32", 4),
    (StoredDType::I16, "I16", 2),
    (StoredDType::I8, "I8", 1),
    (StoredDType::U64, "U64", 8),
    (StoredDType::U32, "U32", 4),
    (StoredDType::U16, "U16", 2),
    (StoredDType::U8, "U8", 1),
    (StoredDType::Bool, "BOOL", 1),
];

impl StoredDType {
    /// The type of a safetensors name (`BF16`); `None` if unknown.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The safetensors name.
    pub fn name(self) -> &'static str {
        TABLE.iter().find(|row| row.0 == self).map_or("?", |row| row.1)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        TABLE.iter().find(|row| row.0 == self).map_or(1, |row| row.2)
    }

    /// Whether elements are floating-point numbers, which may be NaN or infinite.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16 | Self::F8E4M3 | Self::F8E5M2)
    }

    /// The smallest float type that the models read which holds every number of this one, but for f64; f32 where it is
    /// no float.
    pub fn float(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::BF16 | Self::F8E4M3 | Self::F8E5M2 => DType::BF16,
            _ => DType::F32,
        }
    }

    /// The candle type with the same bytes; `None` where candle has none.
    pub fn to_candle(self) -> Option<DType> {
        Some(match self {
            Self::F64 => DType::F64,
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::F8E4M3 => DType::F8E4M3,
            Self::I64 => DType::I64,
            Self::I32 => DType::I32,
            Self::I16 => DType::I16,
            Self::U32 => DType::U32,
            Self::U8 | Self::Bool => DType::U8,
            Self::F8E5M2 | Self::I8 | Self::U64 | Self::U16 => return None,
        })
    }

    /// The stored type of a candle type; `None` for types that this program does not write.
    pub fn from_candle(dtype: DType) -> Option<Self> {
        Some(match dtype {
            DType::F64 => Self::F64,
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            DType::F8E4M3 => Self::F8E4M3,
            DType::I64 => Self::I64,
            DType::I32 => Self::I32,
            DType::I16 => Self::I16,
            DType::U32 => Self::U32,
            DType::U8 => Self::U8,
            _ => return None,
        })
    }
}

impl std::fmt::Display for StoredDType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
