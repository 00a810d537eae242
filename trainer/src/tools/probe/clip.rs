//! CLIP's picture tower.

use kernels::{DType, Device};
use models::clip::Clip;

use super::{Inputs, Outputs};
use crate::error::Result;

/// The states `clip_fea` [b, rows, width] of `image_u8_hwc` [h, w, 3], a picture in 0..255 that is scaled as the official
/// code does; or of `pixels` [b, 3, side, side] as the tower takes them. The `pixels` are returned too.
///
/// # Errors
/// If neither is given, or a shape is not a picture's.
pub fn encode(tower: &Clip, inputs: &Inputs) -> Result<Outputs> {
    let pixels = match inputs.optional("pixels")? {
        Some(pixels) => pixels,
        None => {
            let picture = inputs.ranked("image_u8_hwc", 3)?;
            if picture.dim(2)? != 3 {
                let shape = picture.dims();
                return Err(
                    inputs.refuse(format!("`image_u8_hwc` has shape {shape:?}: [h, w, 3] is expected"))
                );
            }
            let planes = picture.permute((2, 0, 1))?.unsqueeze(0)?.affine(1.0 / 127.5, -1.0)?;
            tower.pixels(&planes)?
        }
    };
    let states = tower.encode(&pixels)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    Ok(Outputs::from([("clip_fea".to_owned(), states), ("pixels".to_owned(), pixels)]))
}
