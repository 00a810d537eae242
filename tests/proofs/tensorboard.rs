//! TensorBoard files have what was written, and a resumed run continues exactly where its checkpoint was.

use proofs::events::{Field, bytes_of, events, fields};
use trainer::watch::tensorboard::{EventWriter, Picture};

#[test]
fn events_read_back_as_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.out.tfevents.tandem");
    let mut writer = EventWriter::open(&path, 0, 1.5).unwrap();
    writer.scalars(300, 2.5, &[("loss/train", 0.125), ("lr", 1e-4)]).unwrap();
    let picture = Picture { encoded: b"\x89PNG", width: 480, height: 96 };
    writer.picture(300, 2.5, "samples", picture).unwrap();
    assert_eq!(writer.sync().unwrap(), std::fs::metadata(&path).unwrap().len());

    let events = events(&path);
    assert_eq!(events[0].1[0], (1, Field::Number(1.5f64.to_bits())));
    assert_eq!(events[0].1[2], (3, Field::Bytes(b"brain.Event:2".to_vec())));
    assert_eq!(events[1].0, 300);
    let values = fields(bytes_of(&events[1].1[2].1));
    let expected = [("loss/train", 0.125f32), ("lr", 1e-4)];
    assert_eq!(values.len(), expected.len());
    for ((_, value), (tag, number)) in values.iter().zip(expected) {
        let bits = u64::from(number.to_bits());
        assert_eq!(
            fields(bytes_of(value)),
            [(1, Field::Bytes(tag.as_bytes().to_vec())), (2, Field::Number(bits))]
        );
    }
    let value = fields(bytes_of(&fields(bytes_of(&events[2].1[2].1))[0].1));
    let image = fields(bytes_of(&value[1].1));
    assert_eq!(image[..3], [(1, Field::Number(96)), (2, Field::Number(480)), (3, Field::Number(3))]);
    assert_eq!(image[3], (4, Field::Bytes(b"\x89PNG".to_vec())));
}

/// A run that is killed after its checkpoint leaves records behind it, the last one cut; resuming must drop them all
/// and give the file of a run that was never killed.
#[test]
fn a_resumed_file_equals_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let (killed, straight) = (folder.path().join("killed.tfevents"), folder.path().join("straight.tfevents"));
    let write = |writer: &mut EventWriter, steps: std::ops::Range<u64>| {
        for step in steps {
            writer.scalars(step, 10.0 + step as f64, &[("loss/train", 1.0 / step as f32)]).unwrap();
        }
    };
    let mut writer = EventWriter::open(&killed, 0, 10.0).unwrap();
    write(&mut writer, 1..11);
    let checkpoint = writer.sync().unwrap();
    write(&mut writer, 11..15);
    let end = writer.sync().unwrap();
    drop(writer);
    std::fs::OpenOptions::new().write(true).open(&killed).unwrap().set_len(end - 5).unwrap();
    let mut writer = EventWriter::open(&killed, checkpoint, 99.0).unwrap();
    write(&mut writer, 11..21);
    writer.sync().unwrap();

    let mut writer = EventWriter::open(&straight, 0, 10.0).unwrap();
    write(&mut writer, 1..21);
    writer.sync().unwrap();
    assert_eq!(std::fs::read(&killed).unwrap(), std::fs::read(&straight).unwrap());
    assert!(
        EventWriter::open(&straight, 30, 0.0).is_ok(),
        "a length inside a record keeps what is whole before it"
    );
}

#[test]
fn another_file_is_not_overwritten_on_resume() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notes.tfevents");
    std::fs::write(&path, "not events, and longer than one record's frame").unwrap();
    let error = EventWriter::open(&path, 40, 0.0).err().unwrap().to_string();
    assert!(error.contains("notes.tfevents"), "{error}");
    assert!(std::fs::read_to_string(&path).unwrap().starts_with("not events"));
}
