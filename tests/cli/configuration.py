"""A short training of the demo, as a configuration has it."""

CONFIG = {
    "model": {"class_path": "lightning_dtda.demo.diabetes.DiabetesRegressor", "init_args": {"width": 4}},
    "data": {"class_path": "lightning_dtda.demo.diabetes.DiabetesData"},
    "trainer": {"max_steps": 12, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
}
