"""A daemon that forecasts every stream in your Kafka topics, one recurrent step for each record."""
